"""Linear algebra shared by the exact Gaussian recursions."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


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
