r"""The stationary state of a linear chain, and the M-step under the constraint that the first state is one.

.. math:: m_0 = (I - A)^{-1} b, \qquad P_0 = A P_0 A^\top + Q
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.exact.linear_gaussian import Gaussian, LinearGaussian

if TYPE_CHECKING:
    from dynavae.exact.em import Expected


def stationary_state(
    A: Float[Tensor, "z_dim z_dim"],
    Q: Float[Tensor, "z_dim z_dim"],
    b: Float[Tensor, " z_dim"] | None = None,
) -> Gaussian:
    """Mean and covariance of z_t once the chain has run for ever without control; differentiable.

    Args:
        A: transition, with eigenvalues inside the unit circle: otherwise there is no such state, and what is returned is
            no covariance.
        Q: covariance of its noise.
        b: offset; default none.

    Example:
        >>> stationary_state(torch.tensor([[0.5]]), torch.tensor([[0.75]]), torch.tensor([1.0]))
        Gaussian(mean=tensor([2.]), covariance=tensor([[1.]]))
    """
    n = len(A)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    mean = A.new_zeros(n) if b is None else torch.linalg.solve(eye - A, b)
    product = torch.einsum("ij,kl->ikjl", A, A).reshape(n * n, n * n)
    P = torch.linalg.solve(torch.eye(n * n, dtype=A.dtype, device=A.device) - product, Q.reshape(-1))
    P = P.reshape(n, n)
    return Gaussian(mean, 0.5 * (P + P.mT))


def is_stable(A: Tensor) -> bool:
    """Whether all eigenvalues are inside the unit circle."""
    return bool(torch.linalg.eigvals(A.detach()).abs().max() < 1)


def maximise_stationary(
    old: LinearGaussian,
    new: LinearGaussian,
    expected: Expected,
    free: Mapping[str, Tensor],
    diagonal: Collection[str],
    floor: float,
) -> LinearGaussian:
    """A, b and Q of the greatest expected log-likelihood when they decide m0 and P0 too, by quasi-Newton steps.

    B and what belongs to the emission is taken from `new`, unless the joint step is no better than `old`.
    """

    def gain(candidate: LinearGaussian) -> Tensor:
        return _expected_log_density(old, candidate, expected)

    with torch.no_grad():
        best, value = _with_start(old._replace(C=new.C, D=new.D, d=new.d, R=new.R)), None
        value = gain(best)
        step = 1.0
        for _ in range(
            20
        ):  # towards the maximum without the first state: the covariances stay positive on the way
            trial = old._replace(
                **{n: _between(getattr(old, n), getattr(new, n), step) for n in ("A", "B", "b", "Q")},
                C=new.C, D=new.D, d=new.d, R=new.R,
            )  # fmt: skip
            if is_stable(trial.A):  # type: ignore[arg-type]
                trial = _with_start(trial)
                if gain(trial) > value:
                    best, value = trial, gain(trial)
                    break
            step *= 0.5
    return _ascend(best, gain, free, diagonal, floor)


def _between(a: Tensor | None, b: Tensor | None, step: float) -> Tensor | None:
    return None if a is None or b is None else a + step * (b - a)


def _with_start(params: LinearGaussian) -> LinearGaussian:
    state = stationary_state(params.A, params.Q, params.b)
    return params._replace(m0=state.mean, P0=state.covariance)


def _expected_log_density(old: LinearGaussian, new: LinearGaussian, expected: Expected) -> Tensor:
    """Of first states and transitions, up to a constant; minus infinity outside the domain."""
    initial, stat = expected.initial, expected.transition
    if not bool(new.P0.isfinite().all()) or not bool(new.A.isfinite().all()):
        return new.A.new_tensor(-torch.inf)
    LP, bad_P = torch.linalg.cholesky_ex(new.P0)
    LQ, bad_Q = torch.linalg.cholesky_ex(new.Q)
    if bool(bad_P.any()) or bool(bad_Q.any()) or not is_stable(new.A):
        return new.A.new_tensor(-torch.inf)
    shift = new.m0 - old.m0
    cross = torch.outer(shift, initial.first)
    second = initial.second - cross - cross.mT + initial.count * torch.outer(shift, shift)
    change = [
        b - a for a, b in ((old.A, new.A), (old.B, new.B), (old.b, new.b)) if a is not None and b is not None
    ]
    change = [c if c.ndim == 2 else c.unsqueeze(-1) for c in change]
    k = stat.ww.shape[-1]
    if old.B is None and k > len(old.A) + 1:
        change.insert(1, change[0].new_zeros(len(old.A), k - len(old.A) - 1))
    if old.b is None:
        change.append(change[0].new_zeros(len(old.A), 1))
    D = torch.cat(change, -1)
    moved = D @ stat.ew[0].mT
    residual = stat.ee[0] - moved - moved.mT + D @ stat.ww[0] @ D.mT

    def term(L: Tensor, S: Tensor, count: Tensor) -> Tensor:
        log_det = 2 * L.diagonal().log().sum()
        return -0.5 * (count * log_det + torch.cholesky_solve(S, L).diagonal().sum())

    return term(LP, second, initial.count) + term(LQ, residual, stat.count[0])


def _ascend(
    start: LinearGaussian, gain: Any, free: Mapping[str, Tensor], diagonal: Collection[str], floor: float
) -> LinearGaussian:
    """Quasi-Newton steps in A, b and the factor of Q; never worse than where they start."""
    A = start.A.detach().contiguous().clone().requires_grad_()
    b = None if start.b is None else start.b.detach().contiguous().clone().requires_grad_()
    root = torch.linalg.cholesky((start.Q - 0.5 * floor * torch.eye(len(A)).to(A)).detach())
    root = root.contiguous().clone().requires_grad_()
    masks = {name: free.get(name, torch.ones_like(value, dtype=torch.bool))
             for name, value in (("A", A), ("b", b), ("Q", root)) if value is not None}  # fmt: skip

    def current() -> LinearGaussian:
        factor = torch.diag(root.diagonal()) if "Q" in diagonal else root.tril()
        Q = factor @ factor.mT + 0.5 * floor * torch.eye(len(A)).to(A)
        values = {"A": A, "Q": Q, **({} if b is None else {"b": b})}
        held = {n: torch.where(masks[n], v, getattr(start, n)) for n, v in values.items()}
        return _with_start(start._replace(**held))

    parameters = [p for p in (A, b, root) if p is not None]
    optimizer = torch.optim.LBFGS(parameters, max_iter=30, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = -gain(current())
            if bool(loss.isfinite()):
                loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        end = current()
        value = gain(end)
        return end if bool(value.isfinite()) and bool(value > gain(start)) else start
