r"""Structural time series: levels, trends, seasons and cycles as blocks of a linear-Gaussian state-space model.

.. math:: x_t = \text{level}_t + \text{season}_t + \dots + D u_t + \varepsilon_t, \quad \varepsilon_t \sim \mathcal N(0, R)

A component is a small block of A, C and Q; `structural` puts blocks side by side. A variance of None is to be learned: see
:func:`dynavae.structural_model`, which makes an `LGSSM` of the same components.

Reference: Harvey, Forecasting, Structural Time Series Models and the Kalman Filter, 1989.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.exact.linear_gaussian import LinearGaussian

__all__ = ["Component", "autoregressive", "cycle", "level", "seasonal", "structural", "trend"]


class Component(NamedTuple):
    """A block of states of one series.

    Attributes:
        names: of the states.
        A: (k, k) transition, as nested lists.
        C: (k,) what the series reads of the states.
        Q: (k,) variances of their noise; None is to be learned.
    """

    names: tuple[str, ...]
    A: list[list[float]]
    C: list[float]
    Q: list[float | None]


def level(variance: float | None = None) -> Component:
    r"""A level that walks: :math:`\mu_t = \mu_{t-1} + \eta_t`; constant with variance 0.

    Example:
        >>> level(0.5).A, level(0.5).Q
        ([[1.0]], [0.5])
    """
    return Component(("level",), [[1.0]], [1.0], [_variance(variance)])


def trend(level_variance: float | None = None, slope_variance: float | None = None) -> Component:
    r"""A level with a slope that walks: :math:`\mu_t = \mu_{t-1} + \beta_{t-1} + \eta_t`, :math:`\beta_t = \beta_{t-1} +
    \zeta_t`; a smooth trend with `level_variance` 0.

    Example:
        >>> trend(0.0).A
        [[1.0, 1.0], [0.0, 1.0]]
    """
    variances = [_variance(level_variance), _variance(slope_variance)]
    return Component(("level", "slope"), [[1.0, 1.0], [0.0, 1.0]], [1.0, 0.0], variances)


def seasonal(period: int, variance: float | None = None) -> Component:
    r"""A season of `period` steps whose effects sum to noise: :math:`\gamma_t = -\sum_{j=1}^{s-1} \gamma_{t-j} + \omega_t`.

    The other s - 2 states remember past effects.

    Example:
        >>> seasonal(4).A
        [[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if period < 2:
        raise ValueError(f"a season has a period of at least 2 steps; got {period}.")
    k = period - 1
    A = [[-1.0] * k, *([float(j == i) for j in range(k)] for i in range(k - 1))]
    names = tuple(f"season {-i}" if i else "season" for i in range(k))
    return Component(names, A, [1.0] + [0.0] * (k - 1), [_variance(variance)] + [0.0] * (k - 1))


def cycle(period: float, damping: float = 1.0, variance: float | None = None) -> Component:
    """A wave of this period, in steps, which noise may turn and raise, and which dies out with a damping below 1.

    Example:
        >>> [round(a, 6) + 0.0 for a in cycle(4.0).A[0]]
        [0.0, 1.0]
    """
    if period <= 2 or not 0 < damping <= 1:
        raise ValueError(
            f"a cycle has a period above 2 steps and a damping in (0, 1]; got {period} and {damping}."
        )
    c, s = (damping * f(2 * math.pi / period) for f in (math.cos, math.sin))
    return Component(("cycle", "cycle*"), [[c, s], [-s, c]], [1.0, 0.0], [_variance(variance)] * 2)


def autoregressive(coefficient: float, variance: float | None = None) -> Component:
    """A deviation that is forgotten: a_t = coefficient a_{t-1} + noise."""
    return Component(("deviation",), [[float(coefficient)]], [1.0], [_variance(variance)])


def structural(
    *components: Component,
    noise: float,
    regression: list[float] | None = None,
    initial_variance: float | list[float] = 1e6,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussian:
    """The model of one series that is the sum of these components; all variances are given.

    Args:
        components: in the order of the states.
        noise: variance R of the observations.
        regression: effect of each control on the series, D; None without controls.
        initial_variance: of every state, or of each; large: nothing is known of the first ones.
        dtype: of the result.

    Raises:
        ValueError: no component, or a variance that is None or negative.

    Example:
        >>> model = structural(trend(0.1, 0.01), seasonal(12, 0.02), noise=1.0)
        >>> model.A.shape, model.C[0, :3]
        (torch.Size([13, 13]), tensor([1., 0., 1.], dtype=torch.float64))
    """
    A, C, Q = blocks(*components)
    if any(q is None for q in Q):
        raise ValueError("structural needs every variance; for those to be learned, take structural_model.")
    k = len(Q)
    P0 = [float(initial_variance)] * k if isinstance(initial_variance, int | float) else initial_variance

    def tensor(value: object) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    return LinearGaussian(
        m0=tensor([0.0] * k),
        P0=torch.diag(tensor(P0)),
        A=tensor(A),
        Q=torch.diag(tensor(Q)),
        C=tensor([C]),
        R=tensor([[_variance(noise)]]),
        D=None if regression is None else tensor([regression]),
    )


def blocks(*components: Component) -> tuple[list[list[float]], list[float], list[float | None]]:
    """A block-diagonal, C and the variances of components side by side."""
    if not components:
        raise ValueError("a structural model needs at least one component, such as level().")
    k = sum(len(c.Q) for c in components)
    A, C, Q = [], [], []
    for c in components:
        start = len(Q)
        A += [[0.0] * start + row + [0.0] * (k - start - len(row)) for row in c.A]
        C += c.C
        Q += c.Q
    return A, C, Q


def _variance(value: float | None) -> float | None:
    if value is not None and value < 0:
        raise ValueError(f"a variance is 0 or more, or None to be learned; got {value}.")
    return None if value is None else float(value)
