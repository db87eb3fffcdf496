r"""Extended and unscented Kalman filter and smoother, for non-linear models with Gaussian noise.

.. math::
    z_1 \sim N(m_0, P_0), \qquad z_t = f(z_{t-1}, u_t) + \varepsilon_t, \quad \varepsilon_t \sim N(0, Q), \qquad
    x_t = h(z_t, u_t) + \delta_t, \quad \delta_t \sim N(0, R)

Both replace f and h by a linear function of the state plus noise, at the current belief N(m, P):

.. math:: g(z) \approx \mu + G (z - m) + N(0, \Omega)

The extended filter by the tangent (:math:`\mu = g(m)`, G the Jacobian, :math:`\Omega = 0`), the unscented one by
regression on sigma points of the belief (:math:`G = \mathrm{Cov}[g, z] P^{-1}`, :math:`\Omega = \mathrm{Cov}[g] - G P
G^\top`). What follows is the Kalman filter, and what comes out beside the moments is the linear model that was used,
so the smoother, posterior samples and prediction are those of :mod:`dynavae.exact.kalman`. Not exact, unless f and h
are linear.

References: Jazwinski, Stochastic Processes and Filtering Theory, 1970. Julier and Uhlmann, Unscented Filtering and Nonlinear
Estimation, 2004. Särkkä, Unscented Rauch-Tung-Striebel Smoother, 2008. García-Fernández et al., Posterior
Linearization Filter, 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact._algebra import cholesky, gaussian_log_density, matvec, per_step, regular, symmetric
from dynavae.exact._entry import check_broadcast, check_float, check_shape, entry
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.joseph import joseph_smoother, joseph_update
from dynavae.exact.linear_gaussian import LinearGaussian

Function = Callable[..., Tensor]
"""g(z) or, in a model with controls, g(z, u): (..., z_dim), (..., u_dim) -> (..., n); leading axes are a batch."""


class NonlinearGaussian(NamedTuple):
    """A non-linear model with Gaussian noise.

    Attributes:
        m0: mean of z_1.
        P0: covariance of z_1.
        f: transition function.
        Q: transition noise covariance, which broadcasts to (T, B, z_dim, z_dim).
        h: emission function.
        R: emission noise covariance, which broadcasts to (T, B, x_dim, x_dim).
    """

    m0: Float[Tensor, "*#B z_dim"]
    P0: Float[Tensor, "*#B z_dim z_dim"]
    f: Function
    Q: Float[Tensor, "*#T_B z_dim z_dim"]
    h: Function
    R: Float[Tensor, "*#T_B x_dim x_dim"]


class Linear(NamedTuple):
    """g(z) = mean + G (z - m) + N(0, spread), at a belief with mean m."""

    mean: Float[Tensor, "*batch n"]
    G: Float[Tensor, "*batch n z_dim"]
    spread: Float[Tensor, "*batch n n"] | float


class Linearised(NamedTuple):
    """Result of :func:`nonlinear_filter`: the moments, and the linear model (T, B, ...) whose filter gives them.

    `kalman.sample_posterior(result.params, result.filtered, noise)` samples paths, for instance.
    """

    filtered: Filtered
    params: LinearGaussian


def tangent(g: Function, m: Float[Tensor, "*batch z_dim"], P: Float[Tensor, "*batch z_dim z_dim"]) -> Linear:
    """Linearise g at m: value and Jacobian, by automatic differentiation.

    Example:
        >>> tangent(torch.sin, torch.zeros(2), torch.eye(2)).G
        tensor([[1., 0.],
                [0., 1.]])
    """
    mean, pull_back = torch.func.vjp(g, m)
    n = mean.shape[-1]
    basis = (
        torch.eye(n, dtype=m.dtype, device=m.device).reshape(n, *[1] * (m.ndim - 1), n).expand(n, *mean.shape)
    )
    (rows,) = torch.func.vmap(pull_back)(basis)
    return Linear(mean, rows.movedim(0, -2), 0.0)


class SigmaPoints(NamedTuple):
    r"""Points :math:`m, m \pm \alpha \sqrt{n + \kappa}\, L_i`, columns of L, where :math:`P = L L^\top`.

    The default has non-negative weights, so that every covariance is one; with kappa = 0 it is the cubature rule.

    Attributes:
        alpha: spread of the points.
        beta: added to the weight of the middle one in covariances, with :math:`1 - \alpha^2`.
        kappa: as in the formula; the weight of the middle one in means is :math:`1 - n / (\alpha^2 (n + \kappa))`.
    """

    alpha: float = 1.0
    beta: float = 0.0
    kappa: float = 1.0

    def __call__(
        self, g: Function, m: Float[Tensor, "*batch z_dim"], P: Float[Tensor, "*batch z_dim z_dim"]
    ) -> Linear:
        """Linearise g by regression on the points.

        Example:
            >>> SigmaPoints()(torch.square, torch.zeros(1), torch.eye(1)).mean.round(decimals=4)
            tensor([1.])
        """
        n = m.shape[-1]
        total = self.alpha**2 * (n + self.kappa)
        P = regular(P, "the covariance of the belief")
        L = cholesky(P, "the covariance of the belief")
        offsets = total**0.5 * torch.cat([torch.zeros_like(L[..., :1]), L, -L], -1).movedim(-1, 0)
        side = torch.full((2 * n,), 0.5 / total, dtype=m.dtype, device=m.device)
        middle = side.new_tensor([1 - n / total])
        weights = torch.cat([middle, side]).reshape(-1, *[1] * m.ndim)
        values = g(m + offsets)
        mean = (weights * values).sum(0)
        error = values - mean
        weights = torch.cat([middle + 1 - self.alpha**2 + self.beta, side]).reshape(-1, *[1] * (m.ndim + 1))
        covariance = (weights * error.unsqueeze(-1) * error.unsqueeze(-2)).sum(0)
        cross = (weights * offsets.unsqueeze(-1) * error.unsqueeze(-2)).sum(0)  # Cov[z, g]
        G = torch.cholesky_solve(cross, L).mT
        return Linear(mean, G, symmetric(covariance - G @ cross))


METHODS: dict[str, Callable[[Function, Tensor, Tensor], Linear]] = {
    "extended": tangent,
    "unscented": SigmaPoints(),
}


def _check(model: Any, x: Any, observed: Any = None, control: Any = None, method: Any = "unscented") -> None:
    if not isinstance(model, NonlinearGaussian):
        raise TypeError(f"model should be a NonlinearGaussian; got {type(model).__name__}.")
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method should be 'extended', 'unscented' or SigmaPoints(...); got {method!r}.")
    x_dim, z = model.R.shape[-1], model.m0.shape[-1]
    if x.ndim != 3 or x.shape[-1] != x_dim or len(x) == 0:
        raise ValueError(
            f"x should have shape (T, B, x_dim) = (time, batch, {x_dim}), T >= 1; got {tuple(x.shape)}."
        )
    T, B, _ = x.shape
    check_float("x", x)
    for name in ("m0", "P0", "Q", "R"):
        check_float(f"model.{name}", getattr(model, name), like=x)
    check_broadcast("model.m0", model.m0, (B, z), "(..., z_dim)")
    check_broadcast("model.P0", model.P0, (B, z, z), "(..., z_dim, z_dim)")
    check_broadcast("model.Q", model.Q, (T, B, z, z), "(..., z_dim, z_dim)")
    check_broadcast("model.R", model.R, (T, B, x_dim, x_dim), "(..., x_dim, x_dim)")
    if observed is not None:
        check_shape("observed", observed, tuple(x.shape), "(T, B, x_dim), that of x,")
        if observed.dtype != torch.bool:
            raise ValueError(f"observed should be bool, True where x is observed; got {observed.dtype}.")
    wrong = (~x.isfinite() & observed) if observed is not None else x.isinf()
    if wrong.any():
        t, row, i = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"x is {x[t, row, i].item()} at t={t}, sequence {row}, coordinate {i}, which is observed; set observed to "
            "False there, or leave observed out and put NaN."
        )
    if control is not None and (
        control.ndim != 3 or control.shape[:2] != (T, B) or not control.isfinite().all()
    ):
        raise ValueError(
            f"control should be finite, of shape (T, B, u_dim) = ({T}, {B}, u_dim); got {tuple(control.shape)}."
        )


@entry(_check)
def nonlinear_filter(
    model: NonlinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
    method: str | SigmaPoints = "unscented",
) -> Linearised:
    """Approximate distribution of each state given the observations so far, and log-likelihood.

    Args:
        model: the model; f and h take (z) or, with a control, (z, u).
        x: observations; NaN is missing.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, which drives the step into z_t and the emission of x_t; finite everywhere.
        method: "extended", "unscented", or :class:`SigmaPoints` with parameters of its own.

    Raises:
        TypeError: if `model` is not a :class:`NonlinearGaussian`.
        ValueError: for shapes or dtypes that do not fit, an observed value that is not finite, an unknown method, or a
            covariance that is not positive definite.

    Example:
        >>> I = torch.eye(1)
        >>> model = NonlinearGaussian(torch.zeros(1), I, torch.sin, 0.1 * I, lambda z: z**3, I)
        >>> x = torch.tensor([1.0, float("nan"), 2.0]).reshape(3, 1, 1)
        >>> nonlinear_filter(model, x, method="unscented").filtered.mean.shape
        torch.Size([3, 1, 1])
    """
    linearise = METHODS[method] if isinstance(method, str) else method
    T, B, x_dim = x.shape
    observed = ~x.isnan() if observed is None else observed
    z_dim = model.m0.shape[-1]
    m, P = model.m0.expand(B, -1), model.P0.expand(B, -1, -1)
    eye = torch.eye(x_dim, dtype=x.dtype, device=x.device)
    no_step = Linear(m, torch.zeros_like(P), 0.0)
    outputs: list[tuple[Tensor, ...]] = []
    innovations, factors = [], []
    controls = [None] * T if control is None else control.unbind(0)
    steps = zip(
        x.unbind(0), observed.unbind(0), controls, per_step(model.Q, T), per_step(model.R, T), strict=True
    )
    for t, (x_t, seen, u, Q, R) in enumerate(steps):
        step = no_step if t == 0 else linearise(_at(model.f, u), m, P)
        before, Q = m, Q + step.spread
        if t > 0:
            m, P = step.mean, symmetric(step.G @ P @ step.G.mT + Q)
        predicted = m, P
        emitted = linearise(_at(model.h, u), m, P)
        R = R + emitted.spread
        C = torch.where(seen.unsqueeze(-1), emitted.G, 0.0)
        e = torch.where(seen, torch.where(seen, x_t, 0.0) - emitted.mean, 0.0)
        both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
        K, P, L = joseph_update(P, C, torch.where(both, R, eye), t)
        m = m + matvec(K, e)
        innovations.append(e)
        factors.append(L)
        linear = (step.G, Q.expand(B, z_dim, z_dim), step.mean - matvec(step.G, before))
        emission = (emitted.G, R.expand(B, x_dim, x_dim), emitted.mean - matvec(emitted.G, predicted[0]))
        outputs.append((m, P, *predicted, *linear, *emission))
    log_likelihood = gaussian_log_density(
        torch.stack(innovations), torch.stack(factors), observed.sum(-1).to(x.dtype)
    )
    *moments, A, Q, b, C, R, d = (torch.stack(column) for column in zip(*outputs, strict=True))
    params = LinearGaussian(model.m0, model.P0, A, Q, C, R, b=b, d=d)
    return Linearised(Filtered(*moments, log_likelihood), params)


def _at(g: Function, u: Tensor | None) -> Function:
    """g of the state alone, at this control."""
    if u is None:
        return g
    return lambda z: g(z, u.expand(*z.shape[:-1], -1))


def nonlinear_smoother(linearised: Linearised | Any) -> Smoothed:
    """Approximate distribution of each state given all observations, with lag-one covariances.

    Args:
        linearised: result of :func:`nonlinear_filter`; the smoother linearises where the filter did.

    Example:
        >>> I = torch.eye(1)
        >>> model = NonlinearGaussian(torch.zeros(1), I, torch.sin, 0.1 * I, lambda z: z**3, I)
        >>> nonlinear_smoother(nonlinear_filter(model, torch.ones(5, 2, 1))).mean.shape
        torch.Size([5, 2, 1])
    """
    if not isinstance(linearised, Linearised):
        raise TypeError(
            f"linearised should be the result of nonlinear_filter; got {type(linearised).__name__}."
        )
    return joseph_smoother(linearised.params, linearised.filtered)
