r"""Structured mean field for switching linear dynamics: messages along the modes and along the states, in turn.

.. math::
    p(s, z) &= p(s_1) \prod_{t>1} p(s_t \mid s_{t-1})\; \prod_t \mathcal N(z_t; A_{s_t} w_t, Q_{s_t}), \qquad
    w_t = (z_{t-1}, u_t) \\
    q(s)\, q(z) &\approx p(s, z) \prod_t \psi_t(z_t) \,/\, Z, \qquad
    \psi_t(z) = \exp(-\tfrac12 z^\top \mathrm{diag}(J_t)\, z + h_t^\top z)

Each factor is the best one given the other: q(s) a hidden Markov chain whose evidence is the expected log-density of z under
each mode, q(z) a linear-Gaussian chain whose natural parameters are averages over the modes. Both are exact by messages, and
every update raises :math:`\mathbb E_q[\log p(s, z) \psi(z)] + H[q(s)] + H[q(z)]`, a lower bound on log Z. With one mode q(z)
is exact.

References: Ghahramani and Hinton, Variational Learning for Switching State-Space Models, 2000; Johnson et al., 2016,
arXiv:1603.06277, section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynavae.exact._algebra import matvec, symmetric
from dynavae.exact._entry import check_float, check_shape, entry
from dynavae.exact.conjugate import ExpectedNormal

__all__ = [
    "Conditionals",
    "ExpectedSums",
    "MeanField",
    "Moments",
    "SwitchingDynamics",
    "conditionals",
    "expected_sums",
    "log_evidence",
    "mean_field",
    "moments",
    "products",
]


class SwitchingDynamics(NamedTuple):
    """Expected parameters of S modes.

    Attributes:
        first: of z_1 on the constant 1, for each mode.
        transition: of z_t on (z_{t-1}, u_t), for each mode; a constant offset is a u_t that is always 1.
        log_initial: log p(s_1), or its expectation.
        log_transition: log p(s_t | s_{t-1}), or its expectation.
    """

    first: ExpectedNormal
    transition: ExpectedNormal
    log_initial: Float[Tensor, " S"]
    log_transition: Float[Tensor, "S S"]


class Conditionals(NamedTuple):
    r""":math:`q(z_t \mid z_{t-1}) = \mathcal N(F_t z_{t-1} + f_t, L_t L_t^\top)`; z_1 has f_1 alone."""

    F: Float[Tensor, "T B n n"]
    f: Float[Tensor, "T B n"]
    L: Float[Tensor, "T B n n"]


class Moments(NamedTuple):
    """Of q(z): means, covariances, and Cov(z_t, z_{t-1}), which is 0 at t = 1."""

    mean: Float[Tensor, "T B n"]
    covariance: Float[Tensor, "T B n n"]
    cross: Float[Tensor, "T B n n"]


class MeanField(NamedTuple):
    r"""Result of :func:`mean_field`.

    Attributes:
        gamma: q(s_t); after the end of a sequence, the prediction.
        xi: q(s_{t-1} = j, s_t = k) at index t - 2.
        precision, linear: what frames t, ..., T say of z_t: :math:`\exp(-\tfrac12 z^\top J z + h^\top z)`.
    """

    gamma: Float[Tensor, "T B S"]
    xi: Float[Tensor, "T-1 B S S"]
    precision: Float[Tensor, "T B n n"]
    linear: Float[Tensor, "T B n"]


class ExpectedSums(NamedTuple):
    """Expected sufficient statistics of the dynamics; those of several batches add up, entry by entry.

    Attributes:
        first: sums of z z', z, 1 and 1 over first frames, for each mode: in the order of `MNIW.natural`.
        transition: sums of z_t z_t', z_t w_t', w_t w_t' and 1 with w_t = (z_{t-1}, u_t), for each mode.
        initial: expected counts of first modes.
        chain: expected counts of pairs of successive modes.
    """

    first: tuple[Tensor, Tensor, Tensor, Tensor]
    transition: tuple[Tensor, Tensor, Tensor, Tensor]
    initial: Float[Tensor, " S"]
    chain: Float[Tensor, "S S"]


class _Average(NamedTuple):
    """The transition under q(s_t), as a function of z_t and z_{t-1}."""

    P: Tensor  # (T, B, n, n) of z_t
    G: Tensor  # (T, B, n, n) of z_t and z_{t-1}
    g: Tensor  # (T, B, n) of z_t
    R: Tensor  # (T, B, n, n) of z_{t-1}
    r: Tensor  # (T, B, n)


def _average(gamma: Tensor, e: ExpectedNormal, u: Tensor) -> _Average:
    n = e.precision.shape[-1]
    P, linear, quadratic = (torch.einsum("tbs,sij->tbij", gamma, part) for part in e[:3])
    return _Average(
        P,
        linear[..., :n],
        matvec(linear[..., n:], u),
        quadratic[..., :n, :n],
        matvec(quadratic[..., :n, n:], u),
    )


def _backward(average: _Average, J: Tensor, h: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Messages of the frames t, ..., T about z_t; frames that are not inside say nothing."""
    n = J.shape[-1]
    P, G, g, R, r = average
    exists = inside[..., None, None]
    own = torch.where(exists, torch.cat([-torch.diag_embed(J), h.unsqueeze(-1)], -1), 0.0)
    into = torch.where(exists, torch.cat([G, g.unsqueeze(-1)], -1), 0.0)
    back = torch.where(exists, torch.cat([-R, -r.unsqueeze(-1)], -1), 0.0)
    last = torch.nn.functional.pad(torch.ones_like(J[0, 0, :1]), (n, 0))  # picks the column of h
    plain = torch.cat([own[:-1] + back[1:], own[-1:]]).unbind()
    message, rows = plain[-1], [plain[-1]]  # [-J, h]
    for P_t, into_t, now in zip(P[1:].flip(0), into[1:].flip(0), plain[-2::-1], strict=True):
        W = torch.linalg.cholesky(P_t - message[..., :n])  # z_t is integrated out
        white = torch.linalg.solve_triangular(W, into_t + last * message, upper=False)
        message = now + white[..., :n].mT @ white
        rows.append(message)
    messages = torch.stack(rows[::-1])
    return -messages[..., :n], messages[..., n]


def _modes(dynamics: SwitchingDynamics, evidence: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """q(s_t) and q(s_{t-1}, s_t), by the forward and the backward recursion in one loop, on scaled probabilities."""
    exists = inside.unsqueeze(-1)
    A, start = dynamics.log_transition.exp(), dynamics.log_initial.exp()
    e = torch.where(exists, (evidence - evidence.detach().amax(-1, keepdim=True)).exp(), 1.0)
    both = torch.stack([e, e.flip(0)], 1).unbind()
    counts = torch.stack(
        [torch.ones_like(exists), exists.flip(0)], 1
    ).unbind()  # the past goes on, the future ends
    moves = torch.stack([A, A.mT]).unsqueeze(1)
    state = both[0] * torch.stack([start, torch.ones_like(start)]).unsqueeze(1)
    rows = [state / state.sum(-1, keepdim=True)]
    for e_t, counts_t in zip(both[1:], counts[1:], strict=True):
        state = e_t * (rows[-1].unsqueeze(-2) @ moves).squeeze(-2)
        rows.append(torch.where(counts_t, state / state.sum(-1, keepdim=True), 1.0))
    past, future = torch.stack(rows, 1)
    future = future.flip(0)
    gamma = torch.cat([start.expand_as(past[:1]), past[:-1] @ A]) * future
    xi = past[:-1].unsqueeze(-1) * A * future[1:].unsqueeze(-2)
    return gamma / gamma.sum(-1, keepdim=True), xi / xi.sum((-2, -1), keepdim=True)


def conditionals(
    dynamics: SwitchingDynamics,
    gamma: Float[Tensor, "T B S"],
    precision: Float[Tensor, "T B n n"],
    linear: Float[Tensor, "T B n"],
    u: Float[Tensor, "T B r"],
    start: bool = True,
) -> Conditionals:
    """The factors of q(z): what a transition, averaged over the modes, and all later frames say of z_t.

    Args:
        dynamics, u: as in :func:`mean_field`.
        gamma, precision, linear: of its result.
        start: the first frame begins the sequence; False: it, too, follows from a state before.
    """
    P, G, g, *_ = _average(gamma, dynamics.transition, u)
    if start:
        P = torch.cat([torch.einsum("bs,sij->bij", gamma[0], dynamics.first.precision)[None], P[1:]])
        g = torch.cat([torch.einsum("bs,si->bi", gamma[0], dynamics.first.linear.squeeze(-1))[None], g[1:]])
        G = torch.cat([torch.zeros_like(G[:1]), G[1:]])
    n = linear.shape[-1]
    eye = torch.eye(n, dtype=P.dtype, device=P.device)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(P + precision), eye, upper=False)
    covariance = root.mT @ root
    moved = covariance @ torch.cat([G, (g + linear).unsqueeze(-1)], -1)
    return Conditionals(moved[..., :n], moved[..., n], torch.linalg.cholesky(covariance))


def moments(q: Conditionals) -> Moments:
    """Means and covariances along the chain."""
    n = q.f.shape[-1]
    pad = torch.nn.functional.pad
    one = pad(torch.ones_like(q.f[:1, :1, :1]), (n, 0))  # (0, ..., 0, 1)
    move = torch.cat(
        [torch.cat([q.F, q.f.unsqueeze(-1)], -1), one.unsqueeze(-2).expand(*q.f.shape[:2], 1, -1)], -2
    )
    noise = pad(q.L @ q.L.mT, (0, 1, 0, 1))
    first = torch.cat([q.f[0], torch.ones_like(q.f[0, :, :1])], -1)
    rows = [first.unsqueeze(-1) * first.unsqueeze(-2) + noise[0]]  # E[(z, 1) (z, 1)']
    for move_t, noise_t in zip(move[1:], noise[1:], strict=True):
        rows.append(move_t @ rows[-1] @ move_t.mT + noise_t)
    second = torch.stack(rows)
    mean = second[..., :n, n]
    covariance = symmetric(second[..., :n, :n] - mean.unsqueeze(-1) * mean.unsqueeze(-2))
    cross = torch.cat([torch.zeros_like(covariance[:1]), q.F[1:] @ covariance[:-1]])
    return Moments(mean, covariance, cross)


def products(q: Moments, u: Float[Tensor, "T B r"]) -> tuple[Tensor, Tensor, Tensor]:
    """E[z z'], E[z_t w_t'] and E[w_t w_t'] with w_t = (z_{t-1}, u_t); the latter two mean nothing at t = 1."""
    before = torch.cat([torch.zeros_like(q.mean[:1]), q.mean[:-1]])
    w = torch.cat([before, u], -1)
    zz = q.covariance + q.mean.unsqueeze(-1) * q.mean.unsqueeze(-2)
    r = u.shape[-1]
    pad = torch.nn.functional.pad
    zw = pad(q.cross, (0, r)) + q.mean.unsqueeze(-1) * w.unsqueeze(-2)
    spread = torch.cat([torch.zeros_like(q.covariance[:1]), q.covariance[:-1]])
    ww = pad(spread, (0, r, 0, r)) + w.unsqueeze(-1) * w.unsqueeze(-2)
    return zz, zw, ww


def log_evidence(
    dynamics: SwitchingDynamics, q: Moments, u: Float[Tensor, "T B r"]
) -> Float[Tensor, "T B S"]:
    """Expected log-density of z_t under each mode: the evidence of q(s)."""
    zz, zw, ww = products(q, u)
    one = torch.ones_like(zz[:1, ..., :1, :1])
    first = dynamics.first.log_density(zz[:1], q.mean[:1].unsqueeze(-1), one)
    return torch.cat([first, dynamics.transition.log_density(zz[1:], zw[1:], ww[1:])])


def expected_sums(
    gamma: Float[Tensor, "T B S"],
    xi: Float[Tensor, "T-1 B S S"],
    q: Moments,
    u: Float[Tensor, "T B r"],
    lengths: Int[Tensor, " B"],
    rows: Bool[Tensor, " B"] | None = None,
) -> ExpectedSums:
    """Sums that a natural gradient reads, under q(s) q(z); frames from `lengths` on and rows that are False do not count."""
    inside = torch.arange(len(u), device=u.device).unsqueeze(-1) < lengths.to(u.device)
    rows = torch.ones_like(inside[0]) if rows is None else rows
    gamma = torch.where((inside & rows).unsqueeze(-1), gamma, 0.0)
    zz, zw, ww = products(q, u)
    one = torch.ones_like(q.mean[:1, :, :1])
    parts = []
    for weight, y in (
        (gamma[:1], (zz[:1], q.mean[:1].unsqueeze(-1), one.unsqueeze(-1))),
        (gamma[1:], (zz[1:], zw[1:], ww[1:])),
    ):
        parts.append((*(torch.einsum("tbs,tbij->sij", weight, part) for part in y), weight.sum((0, 1))))
    pairs = torch.where((inside[1:] & rows)[..., None, None], xi, 0.0).sum((0, 1))
    return ExpectedSums(*parts, gamma[0].sum(0), pairs)


def _check(J: Any, h: Any, u: Any, dynamics: Any, lengths: Any = None, sweeps: int = 4) -> None:
    check_float("J", J)
    if J.ndim != 3 or not len(J):
        raise ValueError(f"J should have shape (T, B, z_dim), T >= 1; got {tuple(J.shape)}.")
    check_float("h", h, like=J)
    check_shape("h", h, tuple(J.shape), "(T, B, z_dim), that of J,")
    n, k = dynamics.transition.linear.shape[-2:]
    check_float("dynamics.transition.linear", dynamics.transition.linear, like=J)
    check_float("u", u, like=J)
    check_shape("u", u, (*J.shape[:2], k - n), "(T, B, k - z_dim)")
    if J.shape[-1] != n:
        raise ValueError(f"J has z_dim = {J.shape[-1]}, the dynamics {n}.")
    if lengths is not None:
        check_shape("lengths", lengths, (J.shape[1],), "(B,)")
    if sweeps < 0:
        raise ValueError(f"sweeps should be 0 or more; got {sweeps}.")


@entry(_check)
def mean_field(
    J: Float[Tensor, "T B n"],
    h: Float[Tensor, "T B n"],
    u: Float[Tensor, "T B r"],
    dynamics: SwitchingDynamics,
    lengths: Int[Tensor, " B"] | None = None,
    sweeps: int = 4,
) -> MeanField:
    r"""q(s) and q(z) after so many updates of each; a differentiable function of all that goes in.

    q(s) begins as p(s), and q(z) is updated last.

    Args:
        J, h: node potentials; 0 where nothing is observed.
        u: regressors beside z_{t-1}: controls, and a constant 1 for an offset.
        dynamics: of S modes; log-probabilities are finite: nothing is impossible.
        lengths: frames of each sequence; default T. What comes after is integrated out.
        sweeps: updates of q(s); with one mode there is nothing to update.

    Raises:
        ValueError, TypeError: for shapes or dtypes that do not fit.

    Example:
        >>> I = torch.eye(1).expand(2, 1, 1)
        >>> A = torch.tensor([[[1.0]], [[-1.0]]])  # one mode keeps the sign, the other changes it
        >>> log_half = torch.full((2, 2), 0.5).log()
        >>> dynamics = SwitchingDynamics(
        ...     ExpectedNormal.known(0 * I, I), ExpectedNormal.known(A, 0.1 * I), log_half[0], log_half
        ... )
        >>> z = torch.tensor([1.0, 1.0, -1.0]).reshape(3, 1, 1)
        >>> q = mean_field(torch.full_like(z, 10.0), 10 * z, z[..., :0], dynamics)
        >>> q.gamma[1:, 0].round(decimals=2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    T, B, _ = J.shape
    S = len(dynamics.log_initial)
    ends = torch.full((B,), T, device=J.device) if lengths is None else lengths.to(J.device)
    inside = torch.arange(T, device=J.device).unsqueeze(-1) < ends

    def states(gamma: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(_average(gamma, dynamics.transition, u), J, h, inside)

    gamma, xi = _modes(dynamics, J.new_zeros(T, B, S), inside)
    for _ in range(sweeps if S > 1 else 0):
        q = moments(conditionals(dynamics, gamma, *states(gamma), u))
        gamma, xi = _modes(dynamics, log_evidence(dynamics, q, u), inside)
    return MeanField(gamma, xi, *states(gamma))
