"""Linear-Gaussian dynamics whose matrices are mixed anew in every step: the part of the KVAE that knows no x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynavae.distributions import MultivariateNormal
from dynavae.exact import kalman
from dynavae.exact._algebra import matvec, symmetric
from dynavae.model import Past
from dynavae.nn import Memory


class Belief(NamedTuple):
    """What is known of the state s_t before a_t, in float64: the belief is N(mean + B u_t, covariance)."""

    mean: Tensor  # (..., n), without the control of this step
    covariance: Tensor  # (..., n, n)
    B: Tensor | None  # (..., n, control_dim), zero at the first step
    C: Tensor  # (..., z_dim, n)
    memory: Any  # of a_<t; () where only the factors of this step are asked


class Walk(NamedTuple):
    """The dynamics along a path of a: weights (T, B, mixtures) and matrices (T, B, ., .)."""

    a: Tensor
    weights: Tensor
    dynamics: kalman.LinearGaussian
    control: Tensor | None


class MixedDynamics:
    r"""What a model with such dynamics inherits: its belief about the state, step by step or for a whole path at once.

    .. math::
        s_t = A_t s_{t-1} + B_t u_t + \mathcal N(0, Q), \qquad a_t = C_t s_t + \mathcal N(0, R), \qquad
        (A, B, C)_t = \textstyle\sum_k \alpha_t^k(a_{<t})\, (A, B, C)^k

    Everything about s is computed in float64.
    """

    A: nn.Parameter
    B: nn.Parameter | None
    C: nn.Parameter
    a_0: nn.Parameter
    rnn: Memory
    to_weights: nn.Linear
    z_dim: int
    state_dim: int
    mixtures: int
    control_dim: int
    state_noise: float
    a_noise: float
    start_variance: float

    @property
    def Q(self) -> Tensor:
        return self._eye(self.state_dim, self.state_noise)

    @property
    def R(self) -> Tensor:
        return self._eye(self.z_dim, self.a_noise)

    @property
    def P0(self) -> Tensor:
        return self._eye(self.state_dim, self.start_variance)

    def _eye(self, size: int, variance: float) -> Tensor:
        return variance * torch.eye(size, dtype=torch.float64, device=self.A.device)

    def initial(self, lead: tuple[int, ...]) -> Belief:
        n = self.state_dim
        memory: Any = ()
        if self.mixtures > 1:
            memory = self.rnn.step(self.rnn.initial(lead), self.a_0.expand(*lead, -1))
        C = self._mix(self.C, self._weights(memory, lead))
        B = None if self.B is None else C.new_zeros(*lead, n, self.control_dim)
        return Belief(C.new_zeros(*lead, n), self.P0.expand(*lead, n, n), B, C, memory)

    def _path(self, z: Tensor, control: Tensor | None, h: Belief) -> tuple[Belief, Tensor, Belief]:
        """The filter along a_1:T = z (T, ..., z_dim): beliefs before each, their means, and the belief after the last."""
        T, lead, n = len(z), z.shape[1:-1], self.state_dim
        memory: Any = ()
        weights = self._weights(h.memory, lead).unsqueeze(0).expand(T, *lead, -1)
        if self.mixtures > 1:  # alpha_t+1 from a_1:t
            out, memory = self.rnn.run(z, h.memory)
            weights = self.to_weights(out).softmax(-1)
        with exactly(z):
            A, C_next = self._mix(self.A, weights), self._mix(self.C, weights)
            B_next = None if self.B is None else self._mix(self.B, weights)
            C = torch.cat([h.C.unsqueeze(0), C_next[:-1]])
            B = None if B_next is None else torch.cat([h.B.unsqueeze(0), B_next[:-1]])
            u_t = None if control is None else control.double().unsqueeze(1).expand(T, *lead, -1)
            m0 = h.mean if B is None else h.mean + matvec(B[0], u_t[0])
            f = kalman.kalman_filter(
                kalman.LinearGaussian(
                    m0.reshape(-1, n),
                    h.covariance.reshape(-1, n, n),
                    flat(torch.cat([A[:1], A[:-1]]), 2),
                    self.Q,
                    flat(C, 2),
                    self.R,
                    None if B is None else flat(B, 2),
                ),
                flat(z.double(), 1),
                control=None if u_t is None else flat(u_t, 1),
            )
            moved = matvec(A, f.mean.reshape(T, *lead, n))
            P = f.covariance[-1].reshape(*lead, n, n)
            last = Belief(
                moved[-1],
                symmetric(A[-1] @ P @ A[-1].mT + self.Q),
                None if B_next is None else B_next[-1],
                C_next[-1],
                memory,
            )
            past = Belief(
                torch.cat([h.mean.unsqueeze(0), moved[:-1]]),
                f.predicted_covariance.reshape(T, *lead, n, n),
                B,
                C,
                (),
            )
        return past, f.predicted_mean.reshape(T, *lead, n), last

    def _after(self, a: Tensor, mean: Tensor, belief: Belief, seen: Tensor | None = None) -> Belief:
        """The belief about the next state, once a_t is known; where it was not seen, that changes nothing."""
        memory = self.rnn.step(belief.memory, a) if self.mixtures > 1 else ()
        weights = self._weights(memory, a.shape[:-1])
        with exactly(a):
            mean, P = self._correct(a, mean, belief, seen)
            A, C = self._mix(self.A, weights), self._mix(self.C, weights)
            B = None if self.B is None else self._mix(self.B, weights)
            return Belief(matvec(A, mean), symmetric(A @ P @ A.mT + self.Q), B, C, memory)

    def _correct(self, a: Tensor, mean: Tensor, belief: Belief, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Kalman's update in Joseph form, with a gain of zero where a_t was not seen."""
        P, C = belief.covariance, belief.C
        CP = C @ P
        factor = torch.linalg.cholesky(symmetric(CP @ C.mT + self.R))
        gain = torch.cholesky_solve(CP, factor).mT
        if seen is not None:
            gain = gain * seen.unsqueeze(-1)
        keep = torch.eye(self.state_dim, dtype=P.dtype, device=P.device) - gain @ C
        mean = mean + matvec(gain, a.double() - matvec(C, mean))
        return mean, symmetric(keep @ P @ keep.mT + gain @ self.R @ gain.mT)

    def _mean(self, past: Past) -> Tensor:
        """Of the state before a_t, with the control of this step."""
        belief: Belief = past.h
        if belief.B is None:
            return belief.mean
        return belief.mean + matvec(belief.B, past.control.double())

    def _weights(self, memory: Any, lead: tuple[int, ...] | torch.Size) -> Tensor:
        """alpha_t (..., mixtures)."""
        if self.mixtures == 1:
            return self.A.new_ones(*lead, 1)
        return self.to_weights(self.rnn.read(memory)).softmax(-1)

    def _mix(self, matrices: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum("...k,kij->...ij", weights.double(), matrices.double())

    def _predictive(self, mean: Tensor, covariance: Tensor, C: Tensor) -> MultivariateNormal:
        """Of a_t, from that of the state."""
        loc = matvec(C, mean)
        S = torch.linalg.cholesky(symmetric(C @ covariance @ C.mT + self.R))
        return MultivariateNormal(loc.to(self.A.dtype), S.to(self.A.dtype))

    def _walk(self, a: Tensor, frames: Tensor, control: Tensor | None) -> Walk:
        """The filter along a (T, B, z_dim), with its predictions where `frames` (T, B, 1) are not seen.

        The weights alpha there are those of the predictions.
        """
        belief = self.initial(tuple(a.shape[1:-1]))
        steps: list[tuple[Tensor, ...]] = []
        for t, (a_t, seen) in enumerate(zip(a.unbind(), frames.unbind(), strict=True)):
            past = Past(None, belief, None if control is None else control[t], None)
            mean = self._mean(past)
            expected = matvec(belief.C, mean).to(a.dtype)
            a_t = torch.where(seen, a_t, expected)
            weights = self._weights(belief.memory, a.shape[1:-1])
            B = () if belief.B is None else (belief.B,)
            steps.append((a_t, weights, self._mix(self.A, weights), belief.C, *B))
            belief = self._after(a_t, mean, belief, seen)
        a, weights, A, C, *B = (torch.stack(part) for part in zip(*steps, strict=True))
        dynamics = kalman.LinearGaussian(
            A.new_zeros(self.state_dim), self.P0, A, self.Q, C, self.R, B[0] if B else None
        )
        return Walk(a, weights, dynamics, control.double() if B and control is not None else None)


def exactly(like: Tensor) -> torch.autocast:
    """No autocast: Kalman algebra would lose its accuracy in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def flat(a: Tensor, own: int) -> Tensor:
    """(T, K, B, ...) to (T, K B, ...), with `own` axes of each."""
    return a.reshape(len(a), -1, *a.shape[a.ndim - own :])
