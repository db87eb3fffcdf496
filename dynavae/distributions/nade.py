"""NADE: binary coordinates, each given those before it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus
from torch.utils.checkpoint import checkpoint

CHUNK = 2**23
"""Most hidden units, rows x d x hidden, that are alive at once: 32 MB in float32."""

DRAWS = 32
"""Draws behind the mean of a NADE."""

REFUSAL = (
    "a NADE emission gives each coordinate its probability given those before it, so a frame of which only some "
    "coordinates are observed has no closed form. Let each frame be observed or missing as a whole, or take the "
    "bernoulli emission, which leaves out single values exactly."
)


@dataclass(frozen=True, eq=False)
class NADEWeights:
    """What all frames share: W (d, hidden) reads the coordinates, V (d, hidden) writes their logits."""

    W: Tensor
    V: Tensor
    activation: str = "sigmoid"

    def act(self, a: Tensor) -> Tensor:
        return a.sigmoid() if self.activation == "sigmoid" else a.relu()


class NADE(NamedTuple):
    r"""Binary coordinates by the chain rule (neural autoregressive distribution estimator).

    .. math::
        p(x) = \prod_{i=1}^d \mathrm{Bernoulli}\big(x_i \mid \sigma(b_i + V_i \cdot \phi(a_i))\big), \qquad
        a_i = c + \sum_{j<i} x_j W_j

    The biases b (..., d) and c (..., hidden) are given anew for every frame, W and V (d, hidden) are shared.
    All coordinates are scored at once, by one cumulative sum; sampling goes through them one by one.

    Coordinates are missing all together or not at all: :meth:`log_prob` refuses a frame of which some are observed.

    References: Larochelle and Murray, The Neural Autoregressive Distribution Estimator, 2011. Boulanger-Lewandowski,
    Bengio and Vincent, Modeling Temporal Dependencies in High-Dimensional Sequences, 2012, arXiv:1206.6392.

    Example:
        >>> shared = NADEWeights(W=torch.full((2, 1), 4.0), V=torch.tensor([[0.0], [8.0]]))
        >>> p = NADE(torch.tensor([0.0, -4.0]), torch.tensor([-2.0]), shared)
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> p.log_prob(x).exp()  # the second coordinate tends to be as the first
        tensor([0.4773, 0.0227, 0.0227, 0.4773])
    """

    bias: Tensor
    hidden: Tensor
    shared: NADEWeights

    def logits(self, x: Tensor) -> Tensor:
        """Of each coordinate given those before it: b_i + V_i . phi(a_i), (..., d)."""
        shared, d = self.shared, self.bias.shape[-1]
        lead = torch.broadcast_shapes(x.shape[:-1], self.bias.shape[:-1])
        x, b, c = (a.expand(*lead, -1).reshape(-1, a.shape[-1]) for a in (x, self.bias, self.hidden))
        parts = _split(CHUNK // (d * c.shape[-1]), x, b, c)
        if len(parts) == 1:
            return _logits(x, b, c, shared).reshape(*lead, d)
        logits = [checkpoint(_logits, *part, shared, use_reentrant=False) for part in parts]
        return torch.cat(logits).reshape(*lead, d)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Log-probability of whole frames (...,) in nats, 0 of a missing one.

        Raises:
            ValueError: a frame is observed in part. In an exported program, which cannot raise, it gets NaN.
        """
        if observed is not None:
            x = torch.where(observed, x, 0.0)
        logits = self.logits(x)
        log_p = (x * logits - softplus(logits)).sum(-1)
        if observed is None:
            return log_p
        some, whole = observed.any(-1), observed.all(-1)
        if not torch.compiler.is_compiling() and not torch.equal(some, whole):
            raise ValueError(f"{REFUSAL[0].upper()}{REFUSAL[1:]}")
        return torch.where(whole, log_p, torch.where(some, torch.nan, 0.0))

    def sample(self, noise: Tensor) -> Tensor:
        return self._chain(torch.special.ndtr(noise))[0]

    @property
    def mean(self) -> Tensor:
        r"""The marginal :math:`p(x_i = 1)`, by Monte Carlo: the average of :math:`p(x_i = 1 \mid x_{<i})` over 32 draws.

        The marginals of a NADE have no closed form. The draws come from fixed, stratified uniforms, the same for every
        frame, so the value is a function of the parameters; without bias over the choice of uniforms, with a standard
        error of at most 0.09 (0.5 / sqrt(32)), and usually far less. Not a mean-field pass, which feeds probabilities in
        place of notes and has a bias that nobody knows.
        """
        uniform = torch.as_tensor(_uniforms(self.bias.shape[-1])).to(self.bias)
        lead = self.bias.shape[:-1]
        b, c = (a.detach().reshape(-1, 1, a.shape[-1]) for a in (self.bias, self.hidden.expand(*lead, -1)))
        parts = _split(2**20 // (DRAWS * c.shape[-1]), b, c)  # so many hidden units stay in the cache
        means = [NADE(*part, self.shared)._chain(uniform)[1].mean(1) for part in parts]
        return torch.cat(means).reshape(self.bias.shape)

    @property
    def stddev(self) -> Tensor:
        """Of each coordinate by itself, from :attr:`mean`."""
        mean = self.mean
        return (mean * (1 - mean)).sqrt()

    @torch.no_grad()
    def _chain(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """x_i = 1 where the i-th uniform is below its probability; x, and those probabilities."""
        W, V = self.shared.W, self.shared.V
        lead = torch.broadcast_shapes(uniform.shape[:-1], self.bias.shape[:-1])
        a = self.hidden.expand(*lead, -1)
        x, p = [], []
        for i, (b_i, u_i) in enumerate(zip(self.bias.unbind(-1), uniform.unbind(-1), strict=True)):
            p.append((b_i + self.shared.act(a) @ V[i]).sigmoid())
            x.append((u_i < p[-1]).to(a.dtype))
            a = torch.addcmul(a, x[-1].unsqueeze(-1), W[i])
        return torch.stack(x, -1), torch.stack(p, -1)

    def kl(self, other: Any) -> Tensor | None:
        return None

    def expand(self, lead: tuple[int, ...]) -> NADE:
        """Both biases expanded to leading axes `lead`."""
        bias, hidden = (a.expand(*lead, a.shape[-1]) for a in (self.bias, self.hidden))
        return NADE(bias, hidden, self.shared)


class _Logits(torch.autograd.Function):
    """Rows (n, .) at once, d leading: two buffers (d, n, hidden) instead of the seven of autograd's own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, c: Tensor, W: Tensor, V: Tensor, sigmoid: bool) -> Tensor:
        a = c.new_empty(x.shape[1], *c.shape)
        a[0] = c
        torch.mul(x.T[:-1, :, None], W[:-1, None, :], out=a[1:])
        a = a.cumsum_(0)  # a_i = c + sum_{j<i} x_j W_j
        s = a.sigmoid_() if sigmoid else a.relu_()
        ctx.save_for_backward(x, b, c, W, V, s)
        ctx.sigmoid = sigmoid
        return b + (s @ V.unsqueeze(-1)).squeeze(-1).T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, b, c, W, V, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives: autograd's own
            inputs = [a for a, needed in zip((x, b, c, W, V), ctx.needs_input_grad, strict=False) if needed]
            logits = _readable(x, b, c, NADEWeights(W, V, "sigmoid" if ctx.sigmoid else "relu"))
            found = iter(torch.autograd.grad(logits, inputs, g, create_graph=True, allow_unused=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None
        g_d = g.T.unsqueeze(-1)
        dV = (s.mT @ g_d).squeeze(-1)
        ds = g_d * V.unsqueeze(1)
        da = (
            torch.ops.aten.sigmoid_backward(ds, s)
            if ctx.sigmoid
            else torch.ops.aten.threshold_backward(ds, s, 0)
        )
        later = da.flip(0).cumsum_(0)  # sums of da_i over i >= j, the last j first
        after = later[:-1]  # over i > j: what x_j W_j enters
        dW = torch.zeros_like(W)
        dW[:-1] = (x.T[:-1].flip(0).unsqueeze(1) @ after).squeeze(1).flip(0)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x)
            dx[:, :-1] = (after @ W[:-1].flip(0).unsqueeze(-1)).squeeze(-1).flip(0).T
        return dx, g, later[-1], dW, dV, None


def _logits(x: Tensor, b: Tensor, c: Tensor, shared: NADEWeights) -> Tensor:
    """Rows (n, .): all a_i by a cumulative sum over what was read before i."""
    if not torch.compiler.is_compiling():
        logits: Tensor = _Logits.apply(x, b, c, shared.W, shared.V, shared.activation == "sigmoid")
        return logits
    return _readable(x, b, c, shared)


def _readable(x: Tensor, b: Tensor, c: Tensor, shared: NADEWeights) -> Tensor:
    read = (x.unsqueeze(-1) * shared.W)[:, :-1].cumsum(1)
    a = c.unsqueeze(1) + pad(read, (0, 0, 1, 0))
    return b + (shared.act(a) * shared.V).sum(-1)


def _split(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Pieces of so many rows; a traced program, whose number of rows is open, takes all at once."""
    if torch.compiler.is_compiling():
        return [tensors]
    return list(zip(*(a.split(max(rows, 1)) for a in tensors), strict=True))


@functools.lru_cache(maxsize=8)
def _uniforms(d: int) -> np.ndarray:
    """(draws, d) in (0, 1): each coordinate has one point in each of `draws` equal intervals."""
    generator = np.random.default_rng(0)
    order = generator.permuted(np.tile(np.arange(DRAWS), (d, 1)), axis=1).T
    return (order + generator.random((DRAWS, d))) / DRAWS
