"""Linear algebra shared by the exact Gaussian recursions."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.derivatives import differentiable_once


def cholesky(
    matrix: Float[Tensor, "*batch n n"], name: str, t: int | None = None
) -> Float[Tensor, "*batch n n"]:
    """Lower Cholesky factor; a failure names the matrix, the time index and the sequence.

    Leading axes are (T, B), or (B,) of one time index `t`.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        index = ([] if t is None else [t]) + info.nonzero()[0].tolist()
        place = f" at t={index[0]}, sequence {index[1]}" if len(index) == 2 else ""
        raise ValueError(
            f"{name} is not positive definite{place}. Check that Q, R and P0 are positive definite; "
            "raise their diagonal, or use float64."
        )
    return factor


def matvec(matrix: Float[Tensor, "*a m n"], vector: Float[Tensor, "*b n"]) -> Float[Tensor, "*c m"]:
    """Matrix times vector over broadcast leading axes."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def symmetric(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Remove the antisymmetric part that rounding leaves."""
    return 0.5 * (matrix + matrix.mT)


SMALL = 6
"""Up to so many rows and columns :class:`Congruence` is one product (measured on a 2-core CPU)."""


class Congruence:
    r"""P -> F P F' + V of many symmetric P (N, ..., z, z); of one small F as :math:`(F \otimes F) \operatorname{vec} P`."""

    def __init__(self, F: Tensor) -> None:
        self.one = F.ndim == 2 and max(F.shape) <= SMALL
        self.F = torch.kron(F, F) if self.one else F

    def __call__(self, P: Tensor, V: Tensor) -> Tensor:
        if not self.one:
            return (P @ self.F.mT).mT @ self.F.mT + V
        rows = torch.addmm(V.reshape(-1), P.reshape(-1, self.F.shape[1]), self.F.mT)
        return rows.view(*P.shape[:-2], *V.shape)

    def square(self) -> None:
        """Twice from now on."""
        self.F = self.F @ self.F

    def squared_norm(self) -> float:
        """The sum of squares of F, the largest of several."""
        squares = self.F.square().sum((-1, -2)).amax().item()
        return float(squares**0.5 if self.one else squares)


def congruence(
    F: Float[Tensor, "n z"], P: Float[Tensor, "*batch z z"], V: Float[Tensor, "n n"]
) -> Float[Tensor, "*batch n n"]:
    """F P F' + V of many symmetric P and one F and V."""
    return Congruence(F)(P, V)


def bare() -> AbstractContextManager[object]:
    """Inference mode if nothing is differentiated: the same numbers, and a sixth less time in what is many small calls."""
    return contextlib.nullcontext() if torch.is_grad_enabled() else torch.inference_mode()


once = differentiable_once("give kalman_filter and kalman_smoother method='joseph'")
"""For the `backward` of a form of filter or smoother."""


def ordinary(a: Tensor) -> Tensor:
    """A tensor that autograd takes: a copy of one from inference mode."""
    return a.clone() if a.is_inference() and not torch.is_inference_mode_enabled() else a


def per_step(matrix: Tensor, T: int) -> list[Tensor]:
    """The matrix of each step; one without a time axis is repeated, not copied."""
    if matrix.ndim < 4 or matrix.shape[0] == 1:
        return [matrix[0] if matrix.ndim == 4 else matrix] * T
    return list(matrix.unbind(0))


def into_later(matrix: Tensor) -> Tensor:
    """The matrices of the steps into z_2, ..., z_T."""
    return matrix[1:] if matrix.ndim == 4 and matrix.shape[0] > 1 else matrix


def gaussian_log_density(
    error: Float[Tensor, "T B n"], factor: Float[Tensor, "T B n n"], count: Float[Tensor, "T B"]
) -> Float[Tensor, "T B"]:
    """log N(e; 0, L L') over `count` coordinates, where every other one has e = 0 and the identity in L."""
    white = torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_density: Tensor = -0.5 * (count * math.log(2 * math.pi) + log_det + white.square().sum(-1))
    return log_density


def semidefinite_cholesky(
    matrix: Float[Tensor, "*batch n n"],
    name: str,
    scale: Float[Tensor, "*batch n"] | None = None,
    eps: float | None = None,
) -> Float[Tensor, "*batch n n"]:
    """Lower factor of a positive semidefinite matrix: the Cholesky factor, with a column of zeros for each zero pivot.

    Pivots are compared with the diagonal of the matrix, or with `scale`: variances from which it was subtracted;
    `eps` is the precision with which the matrix is known, by default that of its type.
    """
    matrix = symmetric(matrix)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).detach() if scale is None else scale.detach()
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any() and not _vanishing(factor, diagonal).any():
        return factor
    n, columns, rest = matrix.shape[-1], [], matrix
    eps = torch.finfo(matrix.dtype).eps if eps is None else eps
    tiny = 16 * n * eps * diagonal
    for j in range(n):
        pivot = rest[..., j, j]
        positive = pivot.detach() > tiny[..., j]
        root = torch.where(positive, pivot, 1.0).sqrt()
        column = torch.where(positive.unsqueeze(-1), rest[..., :, j] / root.unsqueeze(-1), 0.0)
        column = torch.cat([torch.zeros_like(column[..., :j]), column[..., j:]], -1)
        columns.append(column)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    rounding = eps**0.5 * diagonal.abs().amax(-1)
    if not (rest.detach().abs().amax((-1, -2)) <= rounding).all():
        raise ValueError(f"{name} is not positive semidefinite. Check that Q, R and P0 are covariances.")
    return torch.stack(columns, -1)


def regular(matrix: Float[Tensor, "*batch n n"], name: str) -> Float[Tensor, "*batch n n"]:
    """The matrix if it is positive definite; if it is only semidefinite, P + E with which P X = B can be solved.

    E is diagonal, 1 at the coordinates whose pivot vanishes. Its range and that of P have nothing but 0 in common, so for a
    right-hand side in the range of P the solution X of (P + E) X = B has E X = 0, hence P X = B.
    """
    with torch.no_grad():
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not info.any() and not _vanishing(factor, matrix.diagonal(dim1=-2, dim2=-1)).any():
            return matrix
        factor = semidefinite_cholesky(matrix, name)
        dead = factor.diagonal(dim1=-2, dim2=-1) == 0
        scale = matrix.diagonal(dim1=-2, dim2=-1).abs()
        extra = torch.where(dead, torch.where(scale > 0, scale, 1.0), 0.0)
    return matrix + torch.diag_embed(extra)


def regular_cholesky(matrix: Float[Tensor, "*batch n n"], name: str) -> Float[Tensor, "*batch n n"]:
    """Lower Cholesky factor of the :func:`regular` matrix."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any() and not _vanishing(factor, matrix.diagonal(dim1=-2, dim2=-1)).any():
        return factor
    return cholesky(regular(matrix, name), name)


def _vanishing(factor: Tensor, diagonal: Tensor) -> Tensor:
    """Pivots that rounding alone would leave."""
    tiny = 16 * factor.shape[-1] * torch.finfo(factor.dtype).eps
    return factor.detach().diagonal(dim1=-2, dim2=-1).square() <= tiny * diagonal
