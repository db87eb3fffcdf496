r"""Where to start a linear-Gaussian model with one state per coordinate: correlated local levels, by moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact.linear_gaussian import LinearGaussian

PAIRS = 100
"""A correlation needs so many frames that saw both coordinates."""


def local_level(
    sequences: Iterable[tuple[Float[Tensor, "_ x_dim"], Bool[Tensor, "_ x_dim"]]],
) -> LinearGaussian:
    r"""One state per coordinate, which remembers itself; steps are correlated as the coordinates are.

    .. math::
        x_t = \mu + z_t + \varepsilon_t, \quad z_t = a z_{t-1} + \eta_t, \quad
        z_1 \sim \mathcal N(0, \Sigma), \quad \eta_t \sim \mathcal N(0, (1 - a^2) \Sigma), \quad
        \varepsilon_t \sim \mathcal N(0, (1 - s) \mathrm{diag}(v))

    with the variances v, :math:`\Sigma = s \sqrt{v_i v_j}\, \rho_{ij}`, and correlations :math:`\rho` of pairs seen
    together, shrunk by half (to 0 for fewer than 100 pairs). The memory a and the share s of the states in the variance
    are those of all coordinates together, from autocovariances: :math:`c_1 = a s c_0`, :math:`c_2 = a^2 s c_0`.

    Args:
        sequences: values, and whether they were observed, of each sequence.

    Example:
        >>> walk = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> for t in range(1, 500):
        ...     walk[t] = 0.9 * walk[t - 1] + 0.19**0.5 * walk[t]
        >>> model = local_level([(walk, torch.ones(500, 2, dtype=torch.bool))])
        >>> 0.8 < model.A[0, 0] < 0.95, model.R[0, 0] < 0.2
        (tensor(True), tensor(True))
    """
    pieces = [(torch.where(seen, x, 0.0).double(), seen.double()) for x, seen in sequences]
    count = sum(seen.sum(0) for _, seen in pieces).clamp(min=1)  # type: ignore[union-attr]
    mean = sum(x.sum(0) for x, _ in pieces) / count
    pieces = [((x - mean) * seen, seen) for x, seen in pieces]
    together = sum(seen.T @ seen for _, seen in pieces)
    products = sum(x.T @ x for x, _ in pieces)
    variance = (products.diagonal() / count).clamp(min=1e-6)  # type: ignore[union-attr]
    scale = variance.sqrt()

    def autocovariance(lag: int) -> float:
        """Of the standardised coordinates, over all pairs of values `lag` frames apart."""
        pairs = sum((seen[lag:] * seen[:-lag]).sum() for _, seen in pieces)
        total = sum(((x / scale)[lag:] * (x / scale)[:-lag]).sum() for x, _ in pieces)
        return float(total / max(pairs, 1.0))  # type: ignore[type-var]

    first, second = autocovariance(1), autocovariance(2)
    a = min(max(second / first if first > 0 else 0.0, 0.1), 0.999)
    share = min(max(first / a, 0.05), 0.99)
    correlation = products / together.clamp(min=1) / torch.outer(scale, scale)  # type: ignore[union-attr]
    eye = torch.eye(len(mean), dtype=torch.float64)
    rho = 0.5 * eye + 0.5 * torch.where(together >= PAIRS, correlation, 0.0)  # type: ignore[operator]
    values, vectors = torch.linalg.eigh(rho - torch.diag(rho.diagonal()) + eye)
    rho = (vectors * values.clamp(min=0.02)) @ vectors.T
    states = share * torch.outer(scale, scale) * rho
    return LinearGaussian(
        m0=torch.zeros_like(mean),
        P0=states,
        A=a * eye,
        Q=(1 - a**2) * states,
        C=eye,
        R=torch.diag((1 - share) * variance),
        d=mean,
    )
