r"""Conjugate families of linear regressions and of class probabilities, in natural parameters.

.. math::
    p(\theta \mid \eta) = h(\theta) \exp\{\langle \eta, t(\theta) \rangle - \log Z(\eta)\}, \qquad
    p(y \mid \theta) \propto \exp\langle s(y), t(\theta) \rangle

The natural parameters of a conjugate prior are sums that earlier data would have left, so those of the posterior are
:math:`\eta_0 + \sum_n s(y_n)`, and with uncertain y an expected sum takes the place of the sum. From any q the natural
gradient of a variational bound points to that posterior:

.. math::
    \tilde\nabla_\eta \mathcal L = \eta_0 + \textstyle\sum_n \mathbb E_q[s(y_n)] - \eta

so one :func:`step` of length 1 arrives there, and shorter ones follow the noise of minibatches.

References: Hoffman, Blei, Wang and Paisley, Stochastic Variational Inference, 2013, arXiv:1206.7051. Johnson, Duvenaud,
Wiltschko, Datta and Adams, Composing Graphical Models with Neural Networks, 2016, arXiv:1603.06277. Murphy, Probabilistic
Machine Learning: Advanced Topics, 2023 (the matrix normal inverse Wishart family).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.exact._algebra import symmetric
from dynavae.exact._entry import check_float

__all__ = ["MNIW", "Dirichlet", "ExpectedNormal", "step"]


class ExpectedNormal(NamedTuple):
    r"""Expectations that make :math:`\mathbb E[\log \mathcal N(y; A w, \Sigma)]` a sum of products with y and w.

    Attributes:
        precision: :math:`\mathbb E[\Sigma^{-1}]`.
        linear: :math:`\mathbb E[\Sigma^{-1} A]`.
        quadratic: :math:`\mathbb E[A^\top \Sigma^{-1} A]`.
        log_det: :math:`\mathbb E[\log |\Sigma^{-1}|]`.
    """

    precision: Float[Tensor, "*S n n"]
    linear: Float[Tensor, "*S n k"]
    quadratic: Float[Tensor, "*S k k"]
    log_det: Float[Tensor, "*S"]

    @classmethod
    def known(cls, A: Float[Tensor, "*S n k"], covariance: Float[Tensor, "*S n n"]) -> ExpectedNormal:
        """Those of parameters that are known."""
        L = torch.linalg.cholesky(covariance)
        precision = torch.cholesky_inverse(L)
        linear = precision @ A
        log_det = -2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(precision, linear, symmetric(A.mT @ linear), log_det)

    def log_density(
        self, yy: Float[Tensor, "*B n n"], yw: Float[Tensor, "*B n k"], ww: Float[Tensor, "*B k k"]
    ) -> Float[Tensor, "*B S"]:
        """Expected log-density, in nats, at expected products E[yy'], E[yw'] and E[ww'], for each of S normals.

        Example:
            >>> I = torch.eye(1).unsqueeze(0)
            >>> ExpectedNormal.known(0 * I, I).log_density(I[0], I[0], I[0])  # log N(1; 0, 1)
            tensor([-1.4189])
        """
        squares = (
            torch.einsum("sij,...ij->...s", self.precision, yy)
            - 2 * torch.einsum("sij,...ij->...s", self.linear, yw)
            + torch.einsum("sij,...ij->...s", self.quadratic, ww)
        )
        return 0.5 * (self.log_det - self.precision.shape[-1] * math.log(2 * math.pi) - squares)


class MNIW(NamedTuple):
    r"""Matrix normal inverse Wishart: the conjugate family of the linear regression :math:`y \sim \mathcal N(A w, \Sigma)`.

    .. math::
        \Sigma \sim \mathrm{IW}(\Psi, \nu), \qquad A \mid \Sigma \sim \mathcal{MN}(M, \Sigma, K^{-1}), \qquad
        \eta = (\Psi + M K M^\top,\; M K,\; K,\; \nu)

    The natural parameters are sums of :math:`(y y^\top, y w^\top, w w^\top, 1)`. With a regressor that is always 1 it is the
    normal inverse Wishart family of a mean and a covariance. Leading axes are independent members.

    Attributes:
        mean: M (..., n, k), the mean of A.
        rows: K (..., k, k), positive definite: how much of each regressor has been seen.
        scale: :math:`\Psi` (..., n, n), positive definite.
        dof: :math:`\nu` (...), above n - 1.

    Example:
        >>> I = torch.eye(1)
        >>> prior = MNIW(mean=0 * I, rows=I, scale=I, dof=torch.tensor(3.0))
        >>> y = w = torch.tensor([[2.0], [4.0]])
        >>> sums = y.mT @ y, y.mT @ w, w.mT @ w, torch.tensor(2.0)
        >>> posterior = MNIW.from_natural(*(a + b for a, b in zip(prior.natural(), sums)))
        >>> posterior.mean, posterior.dof  # 20 / 21 of the way to A = 1
        (tensor([[0.9524]]), tensor(5.))
    """

    mean: Float[Tensor, "*S n k"]
    rows: Float[Tensor, "*S k k"]
    scale: Float[Tensor, "*S n n"]
    dof: Float[Tensor, "*S"]

    def natural(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Natural parameters, beside sums of yy', yw', ww' and of ones."""
        yw = self.mean @ self.rows
        return symmetric(self.scale + yw @ self.mean.mT), yw, self.rows, self.dof

    @classmethod
    def from_natural(cls, yy: Tensor, yw: Tensor, ww: Tensor, count: Tensor) -> MNIW:
        """The member with these natural parameters.

        Raises:
            ValueError: they belong to no density: `ww`, or the scale they imply, is not positive definite, or `count` is at
                most n - 1.
        """
        for name, value in dict(yy=yy, yw=yw, ww=ww, count=count).items():
            check_float(name, value, like=yy)
        ww = symmetric(ww)
        L, info = torch.linalg.cholesky_ex(ww)
        mean = torch.cholesky_solve(yw.mT, L).mT
        scale = symmetric(yy - mean @ yw.mT)
        n = yy.shape[-1]
        if bool((info > 0).any()) or bool((torch.linalg.cholesky_ex(scale).info > 0).any()):
            raise ValueError(
                "these natural parameters belong to no MNIW density: ww and yy - yw ww^-1 wy should be positive definite. "
                "Sums of products of real data, added to those of a prior, always are."
            )
        if bool((count <= n - 1).any()):
            raise ValueError(
                f"count is the degrees of freedom and should be above n - 1 = {n - 1}; got {count.tolist()}."
            )
        return cls(mean, ww, scale, count)

    def expected(self) -> ExpectedNormal:
        r"""Expected parameters, :math:`\mathbb E[t(\theta)]`: what messages and sums of squares read."""
        n = self.scale.shape[-1]
        L = torch.linalg.cholesky(self.scale)
        precision = self.dof[..., None, None] * torch.cholesky_inverse(L)
        linear = precision @ self.mean
        spread = torch.cholesky_inverse(torch.linalg.cholesky(self.rows))
        i = torch.arange(n, dtype=self.dof.dtype, device=self.dof.device)
        log_det = (
            torch.special.digamma((self.dof.unsqueeze(-1) - i) / 2).sum(-1)
            + n * math.log(2)
            - 2 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )
        return ExpectedNormal(precision, linear, symmetric(self.mean.mT @ linear + n * spread), log_det)

    def log_normaliser(self) -> Float[Tensor, "*S"]:
        r""":math:`\log Z(\eta)`, for :math:`h = |\Sigma|^{-(n + k + 1) / 2}`."""
        n, k = self.mean.shape[-2:]
        half = self.dof / 2
        return (
            0.5 * n * k * math.log(2 * math.pi)
            - 0.5 * n * torch.logdet(self.rows)
            + half * n * math.log(2)
            + torch.special.multigammaln(half, n)
            - half * torch.logdet(self.scale)
        )

    def kl(self, other: MNIW) -> Float[Tensor, "*S"]:
        r""":math:`\mathrm{KL}(q \,\|\, p)` in nats, of `self` from `other`."""
        yy, yw, ww, count = (a - b for a, b in zip(self.natural(), other.natural(), strict=True))
        e = self.expected()
        inner = (
            -0.5 * (e.precision * yy).sum((-2, -1))
            + (e.linear * yw).sum((-2, -1))
            - 0.5 * (e.quadratic * ww).sum((-2, -1))
            + 0.5 * e.log_det * count
        )
        return inner - self.log_normaliser() + other.log_normaliser()


class Dirichlet(NamedTuple):
    r"""The conjugate family of class probabilities; the natural parameters are counts.

    Attributes:
        counts: :math:`\alpha` (..., S), positive.

    Example:
        >>> Dirichlet(torch.tensor([2.0, 6.0])).mean
        tensor([0.2500, 0.7500])
    """

    counts: Float[Tensor, "*B S"]

    @property
    def mean(self) -> Float[Tensor, "*B S"]:
        """Expected probabilities."""
        return self.counts / self.counts.sum(-1, keepdim=True)

    def natural(self) -> tuple[Tensor]:
        """The counts."""
        return (self.counts,)

    @classmethod
    def from_natural(cls, counts: Tensor) -> Dirichlet:
        """The member with these counts.

        Raises:
            ValueError: a count that is not positive.
        """
        check_float("counts", counts)
        if not bool((counts > 0).all()):
            raise ValueError(f"counts of a Dirichlet should be positive; the least is {counts.min().item()}.")
        return cls(counts)

    def expected(self) -> Float[Tensor, "*B S"]:
        r""":math:`\mathbb E[\log \pi]`; its exponential sums to less than one."""
        return torch.special.digamma(self.counts) - torch.special.digamma(self.counts.sum(-1, keepdim=True))

    def log_normaliser(self) -> Float[Tensor, "*B"]:
        """log B(alpha)."""
        return torch.lgamma(self.counts).sum(-1) - torch.lgamma(self.counts.sum(-1))

    def kl(self, other: Dirichlet) -> Float[Tensor, "*B"]:
        r""":math:`\mathrm{KL}(q \,\|\, p)` in nats, of `self` from `other`."""
        inner = ((self.counts - other.counts) * self.expected()).sum(-1)
        return inner - self.log_normaliser() + other.log_normaliser()


def step(q: Any, prior: Any, sums: tuple[Tensor, ...], rate: float = 1.0) -> Any:
    r"""A step along the natural gradient: :math:`\eta \leftarrow \eta + \rho\,(\eta_0 + \sum_n \mathbb E[s(y_n)] - \eta)`.

    Args:
        q: a member of a family: :class:`MNIW` or :class:`Dirichlet`.
        prior: another of the same.
        sums: expected sums over all data, in the order of `natural()`; those of a minibatch times N over its size.
        rate: :math:`\rho`, in (0, 1]; 1 goes to the posterior of the sums.

    Raises:
        ValueError: a rate outside (0, 1].
        TypeError: members of two families.

    Example:
        >>> flat = Dirichlet(torch.ones(2))
        >>> step(flat, flat, (torch.tensor([8.0, 0.0]),), rate=0.5).counts
        tensor([5., 1.])
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is the length of a natural-gradient step, in (0, 1]; got {rate}.")
    if type(q) is not type(prior):
        raise TypeError(
            f"q and its prior should be of one family; got {type(q).__name__}, {type(prior).__name__}."
        )
    target = (a + b.to(a) for a, b in zip(prior.natural(), sums, strict=True))
    return type(q).from_natural(
        *(eta + rate * (to - eta) for eta, to in zip(q.natural(), target, strict=True))
    )
