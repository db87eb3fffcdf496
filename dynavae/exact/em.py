r"""EM for the linear-Gaussian state-space model: expected sums, and the parameters that maximise them.

.. math::
    \theta \leftarrow \arg\max_\theta\; \mathbb{E}\big[\log p_\theta(x_{1:T}, z_{1:T}) \mid x_\mathrm{obs}\big]

The expectation is the smoother's, exactly: with lengths, controls, missing frames and missing coordinates. Transition and
emission are then regressions, of z_t on (z_{t-1}, u_t, 1) and of x_t on (z_t, u_t, 1). Any entry may be held, covariances
may be diagonal, the first state may be that of the stationary chain. log p(x) never falls.

References: Shumway and Stoffer, An Approach to Time Series Smoothing and Forecasting Using the EM Algorithm, 1982.
Ghahramani and Hinton, Parameter Estimation for Linear Dynamical Systems, 1996. Meng and Rubin, Maximum Likelihood Estimation
via the ECM Algorithm, 1993 (held entries under a full covariance).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynavae.exact._algebra import matvec
from dynavae.exact._completion import completion, floored, patterns
from dynavae.exact._entry import check_shape, entry
from dynavae.exact.kalman import Smoothed, kalman_filter, kalman_smoother
from dynavae.exact.linear_gaussian import LinearGaussian, check_constant, offsets
from dynavae.exact.regression import Regression, solve, spread
from dynavae.exact.stationary import maximise_stationary

__all__ = ["Expected", "Initial", "expect", "maximise"]

COVARIANCES = ("P0", "Q", "R")


class Initial(NamedTuple):
    """Sums over sequences of the first state: their number, E[z_1 - m0], E[(z_1 - m0)(z_1 - m0)']."""

    count: Float[Tensor, ""]
    first: Float[Tensor, " z_dim"]
    second: Float[Tensor, "z_dim z_dim"]


class Expected(NamedTuple):
    """Result of :func:`expect`. Those of several batches add up, entry by entry.

    Attributes:
        log_likelihood: log p(x) of all sequences, nats, at the parameters that went in.
        initial: of the first states.
        transition: of z_t on (z_{t-1}, u_t, 1), one group.
        emission: of x_t on (z_t, u_t, 1); one group, or one per coordinate where R is diagonal.
    """

    log_likelihood: Float[Tensor, ""]
    initial: Initial
    transition: Regression
    emission: Regression


def _check(
    params: Any,
    x: Any,
    observed: Any = None,
    control: Any = None,
    lengths: Any = None,
    diagonal: bool = False,
) -> None:
    check_constant(params, x, observed, control)
    if lengths is not None:
        check_shape("lengths", lengths, (x.shape[1],), "(B,)")


@entry(_check)
@torch.no_grad()
def expect(
    params: LinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    diagonal: bool = False,
) -> Expected:
    """The E-step: sums of expected products under the smoother, computed in float64.

    Args:
        params: the model; the same for all steps and sequences.
        x: observations; NaN is missing.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, if the model has B or D; finite everywhere.
        lengths: frames of each sequence; default T. Those after the end could only slow EM down.
        diagonal: R is, and is to stay, diagonal: each coordinate is then a regression on the frames that have it.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or parameters that vary.

    Example:
        >>> I = torch.eye(1, dtype=torch.float64)
        >>> walk = LinearGaussian(m0=I[0], P0=I, A=I, Q=I, C=I, R=I)
        >>> x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).reshape(3, 1, 1)
        >>> better = maximise(walk, expect(walk, x))
        >>> bool(expect(better, x).log_likelihood > expect(walk, x).log_likelihood)
        True
    """
    T, B, _ = x.shape
    observed = ~x.isnan() if observed is None else observed
    params = LinearGaussian(*(None if a is None else a.double() for a in params))
    x = torch.where(observed, x, 0.0).double()
    control = None if control is None else control.double()
    ends = torch.full((B,), T, device=x.device) if lengths is None else lengths.to(x.device)
    valid = torch.arange(T, device=x.device).unsqueeze(-1) < ends
    filtered = kalman_filter(params, x, observed & valid.unsqueeze(-1), control)
    smoothed = kalman_smoother(params, filtered)
    first = smoothed.mean[0] - params.m0
    initial = Initial(x.new_tensor(B), first.sum(0), smoothed.covariance[0].sum(0) + first.mT @ first)
    f, g = offsets(params, T, B, control)
    return Expected(
        filtered.log_likelihood.sum(),
        initial,
        _transition(params, smoothed, f, control, valid),
        _emission(params, smoothed, x, observed & valid.unsqueeze(-1), g, control, diagonal),
    )


def _regressors(z: Tensor, control: Tensor | None) -> Tensor:
    """(z, u, 1)."""
    one = torch.ones_like(z[..., :1])
    return torch.cat([z, one] if control is None else [z, control, one], -1)


def _transition(
    params: LinearGaussian, s: Smoothed, f: Tensor, control: Tensor | None, valid: Tensor
) -> Regression:
    n = s.mean.shape[-1]
    keep = valid[1:].double()
    w = _regressors(s.mean[:-1], None if control is None else control[1:])
    e = s.mean[1:] - matvec(params.A, s.mean[:-1]) - f[1:]
    before = torch.einsum("tb,tbij->ij", keep, s.covariance[:-1])
    after = torch.einsum("tb,tbij->ij", keep, s.covariance[1:])
    across = torch.einsum("tb,tbij->ij", keep, s.cross_covariance)
    kept = keep.unsqueeze(-1)
    ww = torch.einsum("tbi,tbj->ij", w * kept, w)
    ew = torch.einsum("tbi,tbj->ij", e * kept, w)
    ee = torch.einsum("tbi,tbj->ij", e * kept, e)
    moved = across @ params.A.mT
    ww[:n, :n] += before
    ew[:, :n] += across - params.A @ before
    ee += after - moved - moved.mT + params.A @ before @ params.A.mT
    return Regression(keep.sum().reshape(1), ww[None], ew[None], ee[None])


def _emission(
    params: LinearGaussian,
    s: Smoothed,
    x: Tensor,
    observed: Tensor,
    g: Tensor,
    control: Tensor | None,
    diagonal: bool,
) -> Regression:
    n, C = s.mean.shape[-1], params.C
    w, e = _regressors(s.mean, control), torch.where(observed, x - matvec(C, s.mean) - g, 0.0)
    w, e, P, observed = w.flatten(0, 1), e.flatten(0, 1), s.covariance.flatten(0, 1), observed.flatten(0, 1)
    if diagonal:
        seen = observed.double()
        spread_z = torch.einsum("ni,njk->ijk", seen, P)
        ww = torch.einsum("ni,nj,nk->ijk", seen, w, w)
        ww[:, :n, :n] += spread_z
        ew = torch.einsum("ni,nj->ij", e, w)
        ew[:, :n] -= torch.einsum("ij,ijk->ik", C, spread_z)
        ee = e.square().sum(0) + torch.einsum("ij,ijk,ik->i", C, spread_z, C)
        return Regression(seen.sum(0), ww, ew[:, None], ee[:, None, None])
    some = observed.any(-1)
    w, e, P, observed = w[some], e[some], P[some], observed[some]
    masks, of = patterns(observed)
    filled = completion(params.R, masks, of)
    e = filled.mean(e)
    per_pattern = P.new_zeros(len(masks), n, n).index_add_(0, of, P)
    GC = filled.G @ C
    ww = w.mT @ w
    ww[:n, :n] += per_pattern.sum(0)
    ew = e.mT @ w
    ew[:, :n] -= (GC @ per_pattern).sum(0)
    ee = e.mT @ e + (GC @ per_pattern @ GC.mT).sum(0) + filled.covariance(torch.ones_like(e[:, 0]))
    return Regression(some.sum().double().reshape(1), ww[None], ew[None], ee[None])


def maximise(
    params: LinearGaussian,
    expected: Expected,
    free: Mapping[str, Bool[Tensor, ...]] | None = None,
    diagonal: Collection[str] = (),
    stationary: bool = False,
    floor: float = 0.0,
    floor_R: float | None = None,
) -> LinearGaussian:
    r"""The M-step: parameters of the greatest expected log-likelihood, in closed form.

    Args:
        params: what :func:`expect` was given.
        expected: its result, or the sum of several.
        free: by name, which entries of m0, A, B, b, C, D, d may change, and whether (or, for a diagonal one, which
            variances of) P0, Q, R may; what is not named is free. B, D, b and d stay None where they are None.
        diagonal: which of P0, Q, R have no covariances; R as it was said to :func:`expect`.
        stationary: m0 and P0 follow from A, b and Q, as those of a chain that has run for ever; found numerically.
        floor, floor_R: least eigenvalue of P0 and Q, and of R.

    Raises:
        ValueError: an unknown name in `free` or `diagonal`, or a mask of another shape.
    """
    free = dict(free or {})
    _check_constraints(params, free, diagonal)
    old = LinearGaussian(*(None if a is None else a.double() for a in params))
    floors = {"P0": floor, "Q": floor, "R": floor if floor_R is None else floor_R}
    new: dict[str, Tensor | None] = dict(old._asdict())

    def covariance(name: str, value: Tensor) -> Tensor:
        mask, before = free.get(name), getattr(old, name)
        if name in diagonal:
            variance = value.diagonal().clamp(min=floors[name])
            if mask is not None:
                variance = torch.where(mask.diagonal(), variance, before.diagonal())
            return torch.diag(variance)
        return before if mask is not None and not bool(mask.any()) else floored(value, floors[name])

    for stat, names, S in ((expected.transition, "ABb", "Q"), (expected.emission, "CDd", "R")):
        if not bool((stat.count > 0).any()):
            continue  # sequences of one frame have no transition
        mask = _joined_mask(old, free, names)
        change = solve(stat, mask, getattr(old, S))
        n, k = getattr(old, names[0]).shape[-1], change.shape[-1]
        for name, part in zip(names, (change[:, :n], change[:, n : k - 1], change[:, -1]), strict=True):
            before = getattr(old, name)
            new[name] = None if before is None else before + part
        found = spread(stat, change)
        value = torch.diag(found.flatten()) if len(found) > 1 else found[0]
        never = stat.count == 0  # a coordinate that was never seen
        if len(found) > 1 and bool(never.any()):
            value = torch.where(torch.diag(never), getattr(old, S), value)
        new[S] = covariance(S, value)
    if stationary:
        return maximise_stationary(old, LinearGaussian(**new), expected, free, diagonal, floors["Q"])  # type: ignore[arg-type]
    count, first, second = expected.initial
    held = free.get("m0")
    W = None if held is None or bool(held.all()) else torch.linalg.pinv(old.P0, hermitian=True)
    change = first / count
    if W is not None and held is not None:
        inside = held.to(W)
        change = torch.linalg.pinv(W * torch.outer(inside, inside), hermitian=True) @ (inside * (W @ change))
    new["m0"] = old.m0 + change
    cross = torch.outer(change, first)
    new["P0"] = covariance("P0", second / count - (cross + cross.mT) / count + torch.outer(change, change))
    return LinearGaussian(**new)  # type: ignore[arg-type]


def _joined_mask(params: LinearGaussian, free: Mapping[str, Tensor], names: str) -> Tensor:
    """Which entries of [A B b] (or [C D d]) may change."""
    matrix, gain, bias = (getattr(params, name) for name in names)
    rows = len(matrix)
    parts = []
    for name, value, shape in (
        (names[0], matrix, matrix.shape),
        (names[1], gain, None if gain is None else gain.shape),
        (names[2], bias, (rows,)),
    ):
        if shape is None:
            other = params.D if gain is None and names[1] == "B" else params.B
            shape = (rows, 0 if other is None else other.shape[-1])
        default = torch.full(tuple(shape), value is not None, device=matrix.device)
        mask = free.get(name, default) if value is not None else default
        parts.append(mask.reshape(rows, -1))
    return torch.cat(parts, -1)


def _check_constraints(params: LinearGaussian, free: Mapping[str, Tensor], diagonal: Collection[str]) -> None:
    for name in diagonal:
        if name not in COVARIANCES:
            raise ValueError(f"diagonal should name covariances, P0, Q or R; got {name!r}.")
    for name, mask in free.items():
        value = getattr(params, name, None) if name in LinearGaussian._fields else None
        if value is None:
            raise ValueError(f"free names {name!r}, but the model has no such parameter.")
        check_shape(f"free[{name!r}]", mask, tuple(value.shape), f"that of {name}, ")
        if name in COVARIANCES and name not in diagonal and bool(mask.any()) != bool(mask.all()):
            raise ValueError(
                f"free[{name!r}] holds some entries of a full covariance, which has no closed form: hold all, none, or "
                f"name {name!r} in diagonal."
            )
