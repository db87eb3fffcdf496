"""What filters and smoothers return, whatever their form."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Filtered(NamedTuple):
    r"""Result of :func:`~dynavae.exact.kalman.kalman_filter`.

    Attributes:
        mean: :math:`m_{t|t} = \mathbb{E}[z_t \mid x_{1:t}]`.
        covariance: :math:`P_{t|t} = \mathrm{Cov}[z_t \mid x_{1:t}]`.
        predicted_mean: :math:`m_{t|t-1} = \mathbb{E}[z_t \mid x_{1:t-1}]`; :math:`m_0` at t = 1.
        predicted_covariance: :math:`P_{t|t-1} = \mathrm{Cov}[z_t \mid x_{1:t-1}]`; :math:`P_0` at t = 1.
        log_likelihood: :math:`\log p(x_t \mid x_{1:t-1})` in nats, 0 where nothing is observed; its sum over
            time is :math:`\log p(x_{1:T})`.
        factor: of the covariance, L L' = P_{t|t}, lower triangular, which `method="square_root"` propagates and no other
            form has. It keeps the digits that the product loses; it carries no gradient.
        predicted_factor: likewise of the predicted covariance.
        wide: all this in float64, of float32 arguments and `method="auto"` or "compiled": what smoother and samples read.
    """

    mean: Float[Tensor, "T B z_dim"]
    covariance: Float[Tensor, "T B z_dim z_dim"]
    predicted_mean: Float[Tensor, "T B z_dim"]
    predicted_covariance: Float[Tensor, "T B z_dim z_dim"]
    log_likelihood: Float[Tensor, "T B"]
    factor: Float[Tensor, "T B z_dim z_dim"] | None = None
    predicted_factor: Float[Tensor, "T B z_dim z_dim"] | None = None
    wide: Filtered | None = None


class Smoothed(NamedTuple):
    r"""Result of :func:`~dynavae.exact.kalman.kalman_smoother`.

    Attributes:
        mean: :math:`m_{t|T} = \mathbb{E}[z_t \mid x_{1:T}]`.
        covariance: :math:`P_{t|T} = \mathrm{Cov}[z_t \mid x_{1:T}]`.
        gain: :math:`G_t = P_{t|t} A_{t+1}^\top P_{t+1|t}^{-1}`, t = 1 ... T - 1.
        cross_covariance: :math:`\mathrm{Cov}[z_{t+1}, z_t \mid x_{1:T}] = P_{t+1|T} G_t^\top`, t = 1 ... T -
            1.
        factor: of the covariance, L L' = P_{t|T}, of `method="square_root"` only.
    """

    mean: Float[Tensor, "T B z_dim"]
    covariance: Float[Tensor, "T B z_dim z_dim"]
    gain: Float[Tensor, "T-1 B z_dim z_dim"]
    cross_covariance: Float[Tensor, "T-1 B z_dim z_dim"]
    factor: Float[Tensor, "T B z_dim z_dim"] | None = None
