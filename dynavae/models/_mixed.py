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


class Mixed(NamedTuple):
    """The matrices of a step, mixed by its weights."""

    A: Tensor  # (..., n, n)
    C: Tensor  # (..., z_dim, n)
    B: Tensor | None  # (..., n, control_dim)
    b: Tensor | None  # (..., n)

    def moved(self, mean: Tensor) -> Tensor:
        """A m + b."""
        return matvec(self.A, mean) if self.b is None else matvec(self.A, mean) + self.b


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
        s_t = A_t s_{t-1} + B_t u_t + b_t + \mathcal N(0, Q), \qquad a_t = C_t s_t + \mathcal N(0, R), \qquad
        (A, B, C, b)_t = \textstyle\sum_k \alpha_t^k(a_{<t})\, (A, B, C, b)^k

    Everything about s is computed in float64.
    """

    A: nn.Parameter
    B: nn.Parameter | None
    C: nn.Parameter
    b: nn.Parameter | None
    log_Q: nn.Parameter | None
    log_R: nn.Parameter | None
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
        if self.log_Q is None:
            return self._eye(self.state_dim, self.state_noise)
        return torch.diag(self.log_Q.double().exp())

    @property
    def R(self) -> Tensor:
        if self.log_R is None:
            return self._eye(self.z_dim, self.a_noise)
        return torch.diag(self.log_R.double().exp())

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
        C = self._mixed(self._weights(memory, lead)).C
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
            next_ = self._mixed(weights)  # of the steps into 2, ..., T + 1
            C = torch.cat([h.C.unsqueeze(0), next_.C[:-1]])
            B = None if next_.B is None else torch.cat([h.B.unsqueeze(0), next_.B[:-1]])
            u_t = None if control is None else control.double().unsqueeze(1).expand(T, *lead, -1)
            m0 = h.mean if B is None else h.mean + matvec(B[0], u_t[0])
            f = kalman.kalman_filter(
                kalman.LinearGaussian(
                    m0.reshape(-1, n),
                    h.covariance.reshape(-1, n, n),
                    flat(into(next_.A), 2),
                    self.Q,
                    flat(C, 2),
                    self.R,
                    None if B is None else flat(B, 2),
                    b=None if next_.b is None else flat(into(next_.b), 1),
                ),
                flat(z.double(), 1),
                control=None if u_t is None else flat(u_t, 1),
            )
            moved = next_.moved(f.mean.reshape(T, *lead, n))
            P = f.covariance[-1].reshape(*lead, n, n)
            A, C_last, B_last, _ = (None if m is None else m[-1] for m in next_)
            last = Belief(moved[-1], symmetric(A @ P @ A.mT + self.Q), B_last, C_last, memory)
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
            step = self._mixed(weights)
            spread = symmetric(step.A @ P @ step.A.mT + self.Q)
            return Belief(step.moved(mean), spread, step.B, step.C, memory)

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

    def _mixed(self, weights: Tensor) -> Mixed:
        parts = (self.A, self.C, self.B, self.b)
        return Mixed(
            *(None if p is None else torch.tensordot(weights.double(), p.double(), 1) for p in parts)
        )

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
            steps.append((a_t, weights))
            belief = self._after(a_t, mean, belief, seen)
        a, weights = (torch.stack(part) for part in zip(*steps, strict=True))
        A, C, B, b = self._mixed(weights)
        dynamics = kalman.LinearGaussian(A.new_zeros(self.state_dim), self.P0, A, self.Q, C, self.R, B, b=b)
        return Walk(a, weights, dynamics, None if B is None or control is None else control.double())


def exactly(like: Tensor) -> torch.autocast:
    """No autocast: Kalman algebra would lose its accuracy in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def into(a: Tensor) -> Tensor:
    """What drives the steps into 1, ..., T, from what drives those into 2, ..., T + 1; the first is never read."""
    return torch.cat([a[:1], a[:-1]])


def flat(a: Tensor, own: int) -> Tensor:
    """(T, K, B, ...) to (T, K B, ...), with `own` axes of each."""
    return a.reshape(len(a), -1, *a.shape[a.ndim - own :])
