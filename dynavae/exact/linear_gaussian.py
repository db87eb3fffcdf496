r"""The linear-Gaussian state-space model: its parameters, its samples, its observation moments.

.. math::
    z_1 &\sim N(m_0, P_0) \\
    z_t &= A z_{t-1} + B u_t + b + \varepsilon_t, \quad \varepsilon_t \sim N(0, Q), \quad t = 2 \dots T \\
    x_t &= C z_t + D u_t + d + \delta_t, \quad \delta_t \sim N(0, R), \quad t = 1 \dots T

Everything is time-first: x is (T, B, x_dim), the control u is (T, B, u_dim).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact._algebra import matvec, per_step, semidefinite_cholesky, symmetric
from dynavae.exact._entry import check_broadcast, check_float, check_shape, entry


class LinearGaussian(NamedTuple):
    r"""Parameters of a linear-Gaussian state-space model.

    One broadcasting rule: a matrix broadcasts to (T, B, rows, columns), a vector to (T, B, size); `m0` and
    `P0`, which have no time, to (B, z_dim) and (B, z_dim, z_dim). So A is (z_dim, z_dim) for all, (B, z_dim,
    z_dim) for one matrix per sequence, (T, 1, z_dim, z_dim) for one per step, (T, B, z_dim, z_dim) for both.
    A_t, Q_t, B_t, u_t and b_t drive the step *into* z_t, so their values at t = 1 are never read.

    Attributes:
        m0: mean of z_1.
        P0: covariance of z_1, positive definite.
        A: transition matrix.
        Q: transition noise covariance.
        C: emission matrix.
        R: emission noise covariance; it may be full.
        B: control-to-state matrix, or None.
        D: control-to-observation matrix, or None.
        b: state offset, or None.
        d: observation offset, or None.

    Example:
        >>> I = torch.eye(2)
        >>> walk = LinearGaussian(m0=torch.zeros(2), P0=I, A=I, Q=0.1 * I, C=I[:1], R=I[:1, :1])
        >>> walk.C.shape
        torch.Size([1, 2])
    """

    m0: Float[Tensor, "*#B z_dim"]
    P0: Float[Tensor, "*#B z_dim z_dim"]
    A: Float[Tensor, "*#T_B z_dim z_dim"]
    Q: Float[Tensor, "*#T_B z_dim z_dim"]
    C: Float[Tensor, "*#T_B x_dim z_dim"]
    R: Float[Tensor, "*#T_B x_dim x_dim"]
    B: Float[Tensor, "*#T_B z_dim u_dim"] | None = None
    D: Float[Tensor, "*#T_B x_dim u_dim"] | None = None
    b: Float[Tensor, "*#T_B z_dim"] | None = None
    d: Float[Tensor, "*#T_B x_dim"] | None = None


class Gaussian(NamedTuple):
    """Moments of a Gaussian: `mean` (..., n) and `covariance` (..., n, n)."""

    mean: Float[Tensor, "*batch n"]
    covariance: Float[Tensor, "*batch n n"]


class Simulated(NamedTuple):
    """One joint sample: states `z` (T, B, z_dim) and observations `x` (T, B, x_dim)."""

    z: Float[Tensor, "T B z_dim"]
    x: Float[Tensor, "T B x_dim"]


def check_parameters(params: Any, T: int, B: int, control: Any = None) -> None:
    """Raise an error that names the first parameter, or the control, that does not fit T steps of B rows."""
    if not isinstance(params, LinearGaussian):
        raise TypeError(f"params should be a LinearGaussian; got {type(params).__name__}.")
    given = {name: value for name, value in params._asdict().items() if value is not None}
    for name, value in given.items():
        check_float(f"params.{name}", value, like=params.m0)
    z, x = params.m0.shape[-1], params.C.shape[-2]
    inputs = next((M.shape[-1] for M in (params.B, params.D) if M is not None), None)
    dims = {"z_dim": z, "x_dim": x, "u_dim": inputs or 0}
    axes = {"A": "z_dim, z_dim", "Q": "z_dim, z_dim", "C": "x_dim, z_dim", "R": "x_dim, x_dim",
            "B": "z_dim, u_dim", "D": "x_dim, u_dim", "b": "z_dim", "d": "x_dim"}  # fmt: skip
    check_broadcast("params.m0", params.m0, (B, z), "(..., z_dim)")
    check_broadcast("params.P0", params.P0, (B, z, z), "(..., z_dim, z_dim)")
    for name, core in axes.items():
        if name in given:
            sizes = [dims[axis] for axis in core.split(", ")]
            check_broadcast(f"params.{name}", given[name], (T, B, *sizes), f"(..., {core})")
    if inputs is None:
        if control is not None:
            raise ValueError(
                "control was given, but params.B and params.D are None; set one, or drop the control."
            )
        return
    if control is None:
        raise ValueError(
            f"params has B or D, so control (T, B, u_dim) = {(T, B, inputs)} is needed; "
            "pass zeros for no input."
        )
    check_float("control", control, like=params.m0)
    check_shape("control", control, (T, B, inputs), "(T, B, u_dim)")
    if not control.isfinite().all():
        raise ValueError(
            "control has NaN or infinite entries, but cannot be missing: fill and pad it, with 0 say."
        )


def check_sequence(params: Any, x: Any, observed: Any = None, control: Any = None) -> None:
    """Check observations against the parameters; every entry that counts as observed must be finite."""
    if not isinstance(params, LinearGaussian):
        raise TypeError(f"params should be a LinearGaussian; got {type(params).__name__}.")
    if x.ndim != 3 or x.shape[-1] != params.C.shape[-2] or x.shape[0] == 0:
        raise ValueError(
            f"x should have shape (T, B, x_dim) = (time, batch, {params.C.shape[-2]}), T >= 1; "
            f"got {tuple(x.shape)}."
        )
    check_parameters(params, x.shape[0], x.shape[1], control)
    check_float("x", x, like=params.m0)
    if observed is not None:
        check_shape("observed", observed, tuple(x.shape), "(T, B, x_dim), that of x,")
        if observed.dtype != torch.bool:
            raise ValueError(f"observed should be bool, True where x is observed; got {observed.dtype}.")
    wrong = (~x.isfinite() & observed) if observed is not None else x.isinf()
    if wrong.any():
        t, batch, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"x is {x[t, batch, i].item()} at t={t}, sequence {batch}, coordinate {i}, which is observed; "
            "set observed to False there, or leave observed out and put NaN."
        )


def check_constant(params: Any, x: Any, observed: Any = None, control: Any = None) -> None:
    """As :func:`check_sequence`, and the parameters are the same for all steps and sequences."""
    check_sequence(params, x, observed, control)
    for name in LinearGaussian._fields:
        value = getattr(params, name)
        if value is not None and value.ndim > (1 if name in ("m0", "b", "d") else 2):
            raise ValueError(
                f"params.{name} should be the same for all steps and sequences; got shape {tuple(value.shape)}. "
                "Parameters that vary are for kalman_filter."
            )


def check_moments(params: Any, mean: Any, covariance: Any, control: Any = None) -> None:
    """Check state moments (T, B, z_dim) and (T, B, z_dim, z_dim) against the parameters."""
    if mean.ndim != 3:
        raise ValueError(f"mean should have shape (T, B, z_dim); got {tuple(mean.shape)}.")
    check_parameters(params, mean.shape[0], mean.shape[1], control)
    check_shape("mean", mean, (*mean.shape[:2], params.m0.shape[-1]), "(T, B, z_dim)")
    check_shape("covariance", covariance, (*mean.shape, mean.shape[-1]), "(T, B, z_dim, z_dim)")


def check_noise(params: Any, noise_z: Any, noise_x: Any, control: Any = None) -> None:
    """Check the standard normal noise of `simulate` against the parameters."""
    if noise_z.ndim != 3 or noise_z.shape[0] == 0:
        raise ValueError(f"noise_z should have shape (T, B, z_dim) with T >= 1; got {tuple(noise_z.shape)}.")
    T, B, _ = noise_z.shape
    check_parameters(params, T, B, control)
    for name, noise, size in (("z", noise_z, params.m0.shape[-1]), ("x", noise_x, params.C.shape[-2])):
        check_float(f"noise_{name}", noise, like=params.m0)
        check_shape(f"noise_{name}", noise, (T, B, size), f"(T, B, {name}_dim)")


def offsets(
    params: LinearGaussian, T: int, B: int, control: Tensor | None
) -> tuple[Float[Tensor, "T B z_dim"], Float[Tensor, "T B x_dim"]]:
    """The known parts B u_t + b of each transition and D u_t + d of each emission."""

    def known(gain: Tensor | None, bias: Tensor | None, size: int) -> Tensor:
        total = params.m0.new_zeros(T, B, size)
        if gain is not None and control is not None:
            total = total + matvec(gain, control)
        return total if bias is None else total + bias

    return known(params.B, params.b, params.m0.shape[-1]), known(params.D, params.d, params.C.shape[-2])


class Emission(NamedTuple):
    """The observed coordinates of each frame, in fixed shapes: C z + noise = y, noise ~ N(0, R).

    A coordinate that is not observed has a zero row in C, 0 in y, and in R the row and column of the
    identity, so that it adds exactly nothing to gains, determinants and quadratic forms.
    """

    C: Float[Tensor, "T B x_dim z_dim"]
    R: Float[Tensor, "T B x_dim x_dim"]
    y: Float[Tensor, "T B x_dim"]
    seen: Float[Tensor, "T B"]


def observed_emission(
    params: LinearGaussian, x: Tensor, observed: Bool[Tensor, "T B x_dim"] | None, offset: Tensor
) -> Emission:
    """Reduce the emission to what is observed; other values of x (NaN, inf) enter no computation."""
    observed = ~x.isnan() if observed is None else observed
    both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return Emission(
        C=torch.where(observed.unsqueeze(-1), params.C, 0.0),
        R=torch.where(both, params.R, eye),
        y=torch.where(observed, torch.where(observed, x, 0.0) - offset, 0.0),
        seen=observed.sum(-1).to(x.dtype),
    )


@entry(check_moments)
def predictive_observation(
    params: LinearGaussian,
    mean: Float[Tensor, "T B z_dim"],
    covariance: Float[Tensor, "T B z_dim z_dim"],
    control: Float[Tensor, "T B u_dim"] | None = None,
) -> Gaussian:
    r"""Moments of a fresh observation of an uncertain state: N(C m + D u + d, C P C' + R).

    With predicted moments this is p(x_t | x_{<t}). With smoothed ones it is p(x_t | x_obs) of a frame that is
    wholly missing; a partly missing frame under a full R needs the observed coordinates of that frame as
    well.

    Args:
        params: the model.
        mean: means of z_t.
        covariance: covariances of z_t.
        control: u_t, if the model has B or D.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=2 * I, R=I)
        >>> predictive_observation(walk, torch.ones(5, 3, 1), torch.ones(5, 3, 1, 1)).covariance[0, 0]
        tensor([[5.]])
    """
    _, g = offsets(params, mean.shape[0], mean.shape[1], control)
    return Gaussian(matvec(params.C, mean) + g, symmetric(params.C @ covariance @ params.C.mT + params.R))


@entry(check_noise)
def simulate(
    params: LinearGaussian,
    noise_z: Float[Tensor, "T B z_dim"],
    noise_x: Float[Tensor, "T B x_dim"],
    control: Float[Tensor, "T B u_dim"] | None = None,
) -> Simulated:
    r"""Sample z_1:T and x_1:T from the model, as a function of standard normal noise.

    Args:
        params: the model; P0, Q and R may be singular.
        noise_z: standard normal draws, one per state; T and B are read from it.
        noise_x: standard normal draws, one per observation.
        control: u_t, if the model has B or D.

    Raises:
        ValueError: for shapes that do not fit, or a covariance that is not positive semidefinite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> simulate(walk, torch.ones(4, 1, 1), torch.zeros(4, 1, 1)).z.flatten()
        tensor([1., 2., 3., 4.])
    """
    T, B, _ = noise_z.shape
    f, g = offsets(params, T, B, control)
    L0, LQ, LR = (semidefinite_cholesky(getattr(params, name), f"params.{name}") for name in ("P0", "Q", "R"))
    z = [params.m0 + matvec(L0, noise_z[0])]
    driven = (matvec(LQ, noise_z) + f).unbind(0)
    for A, step in zip(per_step(params.A, T)[1:], driven[1:], strict=True):
        z.append(matvec(A, z[-1]) + step)
    states = torch.stack(z)
    return Simulated(states, matvec(params.C, states) + g + matvec(LR, noise_x))
