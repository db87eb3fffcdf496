"""An LGSSM of a series that is the sum of level, trend, season, ... with variances to be learned."""

from __future__ import annotations

import torch  # noqa: F401 (of the example)

from dynavae.exact.structural import Component, blocks
from dynavae.models.lgssm import LGSSM


def structural_model(
    *components: Component,
    noise: float | None = None,
    control_dim: int = 0,
    initial_variance: float = 1e6,
    start: float = 0.1,
) -> LGSSM:
    """A structural time series as a model: A and C are known, the variances that are None are learned, and so is the effect
    D of controls.

    Use it in float64, and on values of moderate size: variances that are said to be 0 are 1e-12.

    Args:
        components: of :mod:`dynavae.exact.structural`: level, trend, seasonal, cycle, autoregressive.
        noise: variance of the observations; None learns it.
        control_dim: known inputs, each with an effect on the series.
        initial_variance: of the first states, whose mean is 0: nothing is known of them.
        start: where variances that are learned begin.

    Returns:
        An `LGSSM` with x_dim = 1; fit it by `fit_em`, or by `fit(..., objective="exact")`.

    Example:
        >>> from dynavae import fit_em
        >>> from dynavae.exact.structural import level
        >>> x = torch.randn(1, 100, 1, dtype=torch.float64).cumsum(1)
        >>> model = structural_model(level()).double()
        >>> result = fit_em(model, x, iterations=5, progress=False)
        >>> model.value("A"), model.parameters_in_moments.Q > 0.1
        (tensor([[1.]], dtype=torch.float64), tensor([[True]]))
    """
    A, C, Q = blocks(*components)
    k = len(Q)
    known = {
        "m0": [0.0] * k,
        "P0": [float(initial_variance)] * k,
        "A": A,
        "b": [0.0] * k,
        "Q": Q,
        "C": [C],
        "d": [0.0],
        "R": [noise],
    }
    if control_dim:
        known["B"] = [[0.0] * control_dim] * k
    model = LGSSM(
        1,
        k,
        control_dim,
        noise="diagonal",
        state_noise="diagonal",
        known=known,
        min_scale=1e-6,
        min_state_scale=1e-6,
    )
    variances = [start if q is None else max(q, 1e-12) for q in Q]
    scale = [[v if i == j else 0.0 for j in range(k)] for i, v in enumerate(variances)]
    return model.set_moments(Q=scale, R=[[start if noise is None else noise]])
