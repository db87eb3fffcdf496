r"""Exact inference in the linear-Gaussian state-space model: filter, smoother, prediction, posterior samples.

Pure, differentiable functions of tensors; batched; time-first. The model, its broadcasting rule and the
meaning of each parameter are in :class:`LinearGaussian`. Missing observations are NaN, or False in
`observed`, per coordinate; a padded frame is a frame with nothing observed, so sequences of different lengths
share a batch. What is not observed changes no number and receives no gradient. Prediction is filtering with
missing frames.

References: Kalman, A New Approach to Linear Filtering and Prediction Problems, 1960. Rauch, Tung and
Striebel, Maximum Likelihood Estimates of Linear Dynamic Systems, 1965. Roweis and Ghahramani, A Unifying
Review of Linear Gaussian Models, 1999.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact import forms
from dynavae.exact._algebra import matvec, per_step, semidefinite_cholesky, symmetric
from dynavae.exact._entry import check_float, check_shape, entry
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.information import Conditioned, Information, backward_information, condition
from dynavae.exact.joseph import reversed_kernel
from dynavae.exact.linear_gaussian import (
    Gaussian,
    LinearGaussian,
    Simulated,
    check_parameters,
    check_sequence,
    offsets,
    predictive_observation,
    simulate,
)
from dynavae.exact.square_root import reversed_kernel_of_roots, with_derivative
from dynavae.tree import tree_map

__all__ = [
    "Conditioned",
    "Filtered",
    "Gaussian",
    "Information",
    "LinearGaussian",
    "Simulated",
    "Smoothed",
    "backward_information",
    "condition",
    "kalman_filter",
    "kalman_predict",
    "kalman_smoother",
    "predictive_observation",
    "sample_posterior",
    "simulate",
]


def _check_filter(
    params: Any, x: Any, observed: Any = None, control: Any = None, method: str = "auto"
) -> None:
    check_sequence(params, x, observed, control)
    forms.check(method, params)


@entry(_check_filter)
def kalman_filter(
    params: LinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
    method: str = "auto",
) -> Filtered:
    r"""Distribution of each state given the observations so far, and the log-likelihood.

    .. math::
        e_t &= x_t - C m_{t|t-1} - D u_t - d, \qquad S_t = C P_{t|t-1} C^\top + R, \qquad
        K_t = P_{t|t-1} C^\top S_t^{-1} \\
        m_{t|t} &= m_{t|t-1} + K_t e_t, \qquad
        P_{t|t} = (I - K_t C) P_{t|t-1} (I - K_t C)^\top + K_t R K_t^\top

    Args:
        params: the model; S_t has to be positive definite, so Q and P0 may be singular if R is not.
        x: observations; NaN is missing.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, if the model has B or D; finite everywhere.
        method: form of the computation, all with the same results: "joseph", "square_root", "parallel", "shared",
            "compiled", or "auto", which chooses by :func:`dynavae.exact.forms.choose`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, an observed value that is not finite, an unknown method or one
            that does not apply, or an S_t that is not positive definite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> x = torch.tensor([1.0, float("nan"), 2.0]).reshape(3, 1, 1)
        >>> kalman_filter(walk, x).covariance.flatten()
        tensor([0.5000, 1.5000, 0.7143])
    """
    T, B, _ = x.shape
    observed = ~x.isnan() if observed is None else observed
    f, g = offsets(params, T, B, control)
    return forms.run_filter(method, params, x, observed, f, g)


def _check_filtered(params: Any, filtered: Any) -> None:
    if not isinstance(filtered, Filtered):
        raise TypeError(f"filtered should be the result of kalman_filter; got {type(filtered).__name__}.")
    T, B, _ = filtered.mean.shape
    inputless = params._replace(B=None, D=None)  # the controls are already in the predicted means
    check_parameters(inputless, T, B)
    z = params.m0.shape[-1]
    for name, axes in (("mean", 1), ("covariance", 2), ("predicted_mean", 1), ("predicted_covariance", 2)):
        value = getattr(filtered, name)
        check_shape(
            f"filtered.{name}", value, (T, B, *[z] * axes), f"({', '.join(['T', 'B', *['z_dim'] * axes])})"
        )
        check_float(f"filtered.{name}", value, like=params.m0)


def _check_smoother(params: Any, filtered: Any, method: str = "auto") -> None:
    _check_filtered(params, filtered)
    forms.check(method, params)
    if method == "square_root" and filtered.factor is None:
        raise ValueError(
            "method='square_root' smooths factors, which filtered does not have; filter with "
            "kalman_filter(..., method='square_root') too."
        )


@entry(_check_smoother)
def kalman_smoother(params: LinearGaussian, filtered: Filtered, method: str = "auto") -> Smoothed:
    r"""Distribution of each state given all observations (Rauch, Tung and Striebel).

    .. math::
        G_t = P_{t|t} A_{t+1}^\top P_{t+1|t}^{-1}, \quad
        m_{t|T} = m_{t|t} + G_t (m_{t+1|T} - m_{t+1|t}), \quad
        P_{t|T} = P_{t|t} + G_t (P_{t+1|T} - P_{t+1|t}) G_t^\top

    Missing data, lengths and controls are already in `filtered`. After the end of a sequence the result is
    the prediction, equal to the filtered moments.

    Where a predicted covariance is singular, as with states that are known without error, its inverse is one on its range.

    Args:
        params: the model.
        filtered: result of :func:`kalman_filter` for the same model.
        method: as for :func:`kalman_filter`, of the same method or another one; "square_root" needs its factors.

    Raises:
        ValueError: for shapes that do not fit, an unknown method or one that does not apply, or a predicted covariance that
            is not positive semidefinite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> x = torch.tensor([1.0, float("nan"), 2.0]).reshape(3, 1, 1)
        >>> kalman_smoother(walk, kalman_filter(walk, x)).mean.flatten()
        tensor([0.7143, 1.1429, 1.5714])
    """
    return forms.run_smoother(method, params, filtered)


def _check_posterior_noise(params: Any, filtered: Any, noise: Any) -> None:
    _check_filtered(params, filtered)
    T, B, z_dim = filtered.mean.shape
    if noise.ndim != 4 or (noise.shape[0], *noise.shape[2:]) != (T, B, z_dim):
        raise ValueError(
            f"noise should have shape (T, K, B, z_dim) = ({T}, K, {B}, {z_dim}); got {tuple(noise.shape)}."
        )
    check_float("noise", noise, like=params.m0)


@entry(_check_posterior_noise)
def sample_posterior(
    params: LinearGaussian, filtered: Filtered, noise: Float[Tensor, "T K B z_dim"]
) -> Float[Tensor, "T K B z_dim"]:
    r"""Sample whole paths z_1:T from p(z_1:T | x_1:T), backward in time, as a function of normal noise.

    .. math::
        z_T \sim N(m_{T|T}, P_{T|T}), \qquad
        z_t \mid z_{t+1} \sim N\big(m_{t|t} + G_t (z_{t+1} - m_{t+1|t}),\; P_{t|t} - G_t P_{t+1|t}
        G_t^\top\big)

    Args:
        params: the model.
        filtered: result of :func:`kalman_filter` for the same model.
        noise: standard normal draws, K paths of each sequence.

    Raises:
        ValueError: for shapes that do not fit, or a conditional covariance that is not positive semidefinite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> filtered = kalman_filter(walk, torch.ones(6, 2, 1))
        >>> sample_posterior(walk, filtered, torch.randn(6, 100, 2, 1)).shape
        torch.Size([6, 100, 2, 1])
    """
    dtype, filtered = filtered.mean.dtype, forms.widened(filtered)
    params, noise = tree_map(lambda a: a.to(filtered.mean.dtype), (params, noise))
    gain, L = _backward_step(params, filtered)
    shocks = (filtered.mean.unsqueeze(1) + matvec(L.unsqueeze(1), noise)).unbind(0)
    z = [shocks[-1]]
    for G, predicted_mean, shock in reversed(
        list(zip(gain, filtered.predicted_mean[1:], shocks[:-1], strict=True))
    ):
        z.append(shock + matvec(G, z[-1] - predicted_mean))
    return torch.stack(z[::-1]).to(dtype)


def _backward_step(params: LinearGaussian, filtered: Filtered) -> tuple[Tensor, Tensor]:
    """Gains, and factors of the covariances of p(z_t | z_{t+1}, x_1:t) and, last, of p(z_T | x_1:T)."""
    scale, last = filtered.covariance.diagonal(dim1=-2, dim2=-1), filtered.covariance[-1:]
    name = "Cov(z_t | z_{t+1}, x_1:t)"
    if filtered.factor is None:
        gain, spread = reversed_kernel(params, filtered)
        return gain, semidefinite_cholesky(torch.cat([spread, last]), name, scale)
    gain, spread, roots = reversed_kernel_of_roots(params, filtered)
    spread, roots = torch.cat([spread, last]), torch.cat([roots, filtered.factor[-1:]])
    return gain, with_derivative(
        roots, semidefinite_cholesky(spread, name, scale)
    ) if spread.requires_grad else roots


def _check_prediction(params: Any, mean: Any, covariance: Any, steps: int, control: Any = None) -> None:
    if mean.ndim != 2:
        raise ValueError(f"mean should have shape (B, z_dim), one time step; got {tuple(mean.shape)}.")
    if steps < 1:
        raise ValueError(f"steps should be at least 1; got {steps}.")
    check_parameters(params, steps, mean.shape[0], control)
    check_float("mean", mean, like=params.m0)
    check_shape("mean", mean, (mean.shape[0], params.m0.shape[-1]), "(B, z_dim)")
    check_shape("covariance", covariance, (*mean.shape, mean.shape[-1]), "(B, z_dim, z_dim)")


@entry(_check_prediction)
def kalman_predict(
    params: LinearGaussian,
    mean: Float[Tensor, "B z_dim"],
    covariance: Float[Tensor, "B z_dim z_dim"],
    steps: int,
    control: Float[Tensor, "steps B u_dim"] | None = None,
) -> Gaussian:
    r"""Moments of the next states, :math:`z_{t+1}, \dots, z_{t+\text{steps}}`, from those of z_t.

    The same numbers as filtering with `steps` more frames that are all missing. The first prediction is the
    `m0, P0` with which to filter the next chunk of a long sequence.

    Args:
        params: the model; what varies in time covers the predicted steps.
        mean: of z_t, such as the last filtered one.
        covariance: of z_t.
        steps: number of states to predict.
        control: inputs into the predicted steps, if the model has B or D.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> kalman_predict(walk, torch.ones(1, 1), torch.ones(1, 1, 1), steps=3).covariance.flatten()
        tensor([2., 3., 4.])
    """
    f, _ = offsets(params, steps, mean.shape[0], control)
    moments = [(mean, covariance)]
    for A, Q, f_t in zip(per_step(params.A, steps), per_step(params.Q, steps), f.unbind(0), strict=True):
        m, P = moments[-1]
        moments.append((matvec(A, m) + f_t, symmetric(A @ P @ A.mT + Q)))
    means, covariances = zip(*moments[1:], strict=True)
    return Gaussian(torch.stack(means), torch.stack(covariances))
