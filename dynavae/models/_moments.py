"""The parameters of a linear-Gaussian state-space model: what is learned, what is known, and their form as matrices."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.exact import kalman
from dynavae.exact._algebra import cholesky
from dynavae.exact.stationary import stationary_state
from dynavae.nn.heads import inverse_softplus

STABLE = 0.9999
"""Largest modulus of an eigenvalue of A, if the chain is stationary: a larger A is scaled down."""
FLOOR = 1e-4
"""Least diagonal of the Cholesky factors of P_0 and Q."""

M = TypeVar("M", bound="Moments")


class Moments(nn.Module):
    """m0, P0, A, Q, C, R, b, d, B, D. Covariances are held by Cholesky factors whose diagonal has a floor.

    What is known of a parameter stands in its place, where it is needed; nothing of it is learned, or in the state dict.
    """

    def create_parameters(
        self,
        x_dim: int,
        z_dim: int,
        control_dim: int,
        noise: str,
        state_noise: str,
        min_scale: float,
        min_state_scale: float,
        stationary: bool,
        known: dict[str, Any] | None,
    ) -> None:
        """Make them; the arguments are those of :class:`~dynavae.LGSSM`."""
        for name, kind in (("noise", noise), ("state_noise", state_noise)):
            if kind not in ("full", "diagonal"):
                raise ValueError(f"{name} should be 'full' or 'diagonal'; got {kind!r}.")
        for name, scale in (("min_scale", min_scale), ("min_state_scale", min_state_scale)):
            if scale <= 0:
                raise ValueError(f"{name} should be positive; got {scale}.")
        self.stationary = stationary
        self.floors = {"P0": min_state_scale, "Q": min_state_scale, "R": min_scale}
        held = dict(known or {})
        if stationary and {"m0", "P0"} & set(held):
            raise ValueError("stationary=True says what m0 and P0 are: leave them out of known.")
        self.kinds = {"P0": "full", "Q": state_noise, "R": noise}
        for name in {"P0", "Q", "R"} & set(held):
            if not isinstance(held[name][0], list | tuple):
                self.kinds[name] = "diagonal"
        self.m0 = None if stationary else nn.Parameter(torch.zeros(z_dim))
        stay = 0.5 if stationary else 0.9
        self.A = nn.Parameter(stay * torch.eye(z_dim) + 0.05 * torch.randn(z_dim, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(z_dim))
        self.C = nn.Parameter(torch.randn(x_dim, z_dim) / math.sqrt(z_dim))
        self.d = nn.Parameter(torch.zeros(x_dim))
        scales = {"P0": 1.0, "Q": 0.3, "R": max(0.5, 1.5 * min_scale)}
        for name, scale in scales.items():
            raw = _raw(
                x_dim if name == "R" else z_dim, max(scale, 1.5 * self.floors[name]), self.floors[name]
            )
            raw = raw if self.kinds[name] == "full" else raw.diagonal().clone()
            self.register_parameter(f"raw_{name}", None if stationary and name == "P0" else nn.Parameter(raw))
        self.B = nn.Parameter(0.1 * torch.randn(z_dim, control_dim)) if control_dim else None
        self.D = nn.Parameter(torch.zeros(x_dim, control_dim)) if control_dim else None
        for name, value in held.items():
            self._hold(name, value)

    def _hold(self, name: str, value: Any) -> None:
        """Keep what is known of a parameter, with NaN where it is learned; nothing of it is in the state dict."""
        covariance = name in self.kinds
        target = getattr(self, f"raw_{name}" if covariance else name, None)
        if target is None or name not in kalman.LinearGaussian._fields:
            raise ValueError(
                f"known names {name!r}, which is no parameter of this LGSSM; it has m0, P0, A, Q, C, R, b, d, and B, D "
                "with controls."
            )
        held = torch.tensor(_nan_for_none(value), dtype=torch.float64)
        if held.shape != target.shape:
            raise ValueError(
                f"known[{name!r}] should have shape {tuple(target.shape)}; got {tuple(held.shape)}."
            )
        if covariance and held.ndim == 2 and bool(held.isnan().any()):
            raise ValueError(
                f"known[{name!r}] should be a whole matrix, or a list of variances; a full one cannot be learned in part."
            )
        self.register_buffer(f"known_{name}", held, persistent=False)
        if not bool(held.isnan().any()):
            target.requires_grad_(False)

    def _known(self, name: str) -> Tensor | None:
        return getattr(self, f"known_{name}", None)

    def value(self, name: str) -> Tensor:
        """A, b, C, d, B, D or m0: what is known of it, and for the rest the parameter."""
        if name == "m0" and self.stationary:
            return stationary_state(self.value("A"), self._covariance("Q"), self.value("b")).mean
        parameter, known = getattr(self, name), self._known(name)
        if name == "A" and self.stationary:  # a chain that has run for ever is stable
            radius = torch.linalg.eigvals(parameter).abs().amax()
            parameter = parameter * (STABLE / radius.clamp(min=STABLE))
        return parameter if known is None else torch.where(known.isnan(), parameter, known.to(parameter))

    @property
    def parameters_in_moments(self) -> kalman.LinearGaussian:
        """m_0, P_0, A, Q, C, R, B, D, b, d as matrices."""
        (P0, Q, R) = (L @ L.mT for L in self.factors)
        B, D = (None if getattr(self, name) is None else self.value(name) for name in "BD")
        m0, A, C, b, d = (self.value(name) for name in ("m0", "A", "C", "b", "d"))
        return kalman.LinearGaussian(m0, P0, A, Q, C, R, B, D, b, d)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower Cholesky factors of P_0, Q and R."""
        return self._factor("P0"), self._factor("Q"), self._factor("R")

    def _covariance(self, name: str) -> Tensor:
        L = self._factor(name)
        return L @ L.mT

    def _factor(self, name: str) -> Tensor:
        floor = self.floors[name]
        if name == "P0" and self.stationary:
            P0 = stationary_state(self.value("A"), self._covariance("Q")).covariance
            return cholesky(
                P0, "P0 of the stationary chain (are all eigenvalues of A inside the unit circle?)"
            )
        raw, known = getattr(self, f"raw_{name}"), self._known(name)
        if raw.ndim == 2:
            return _factor(raw, floor) if known is None else torch.linalg.cholesky(known).to(raw)
        scale = softplus(raw) + floor
        if known is not None:
            held = known.nan_to_num(1.0).clamp(min=floor**2).sqrt().to(raw)
            scale = torch.where(known.isnan(), scale, held)
        return torch.diag(scale)

    @torch.no_grad()
    def set_moments(self: M, **values: Any) -> M:
        """Set m0, P0, A, Q, C, R, B, D, b, d by name; covariances positive definite. What is known stays as it is.

        Example:
            >>> from dynavae import LGSSM
            >>> LGSSM(x_dim=1, z_dim=1).set_moments(Q=[[0.25]]).parameters_in_moments.Q
            tensor([[0.2500]], grad_fn=<MmBackward0>)
        """
        for name, value in values.items():
            covariance = name in ("P0", "Q", "R")
            target = getattr(self, f"raw_{name}" if covariance else name, None)
            if target is None:
                raise ValueError(
                    f"LGSSM has no parameter {name!r}; it has m0, P0, A, Q, C, R, b, d, and B, D with controls."
                )
            value = torch.as_tensor(value, dtype=torch.float64, device=target.device)
            if covariance:
                floor = self.floors[name]
                if target.ndim == 2:
                    value = _unfactor(torch.linalg.cholesky(value), floor)
                else:
                    value = inverse_softplus((value.diagonal().sqrt() - floor).clamp(min=1e-12))
            if value.shape != target.shape:
                raise ValueError(f"{name} should have shape {tuple(target.shape)}; got {tuple(value.shape)}.")
            target.copy_(value)
        return self


def _factor(raw: Tensor, floor: float = FLOOR) -> Tensor:
    """A lower triangular factor with a positive diagonal."""
    return raw.tril(-1) + torch.diag(softplus(raw.diagonal()) + floor)


def _unfactor(L: Tensor, floor: float = FLOOR) -> Tensor:
    """The inverse of :func:`_factor`; a diagonal below the floor is raised to it."""
    return L.tril(-1) + torch.diag(inverse_softplus((L.diagonal() - floor).clamp(min=1e-12)))


def _nan_for_none(value: Any) -> Any:
    """Nested lists with NaN for None."""
    if isinstance(value, list | tuple):
        return [_nan_for_none(v) for v in value]
    return math.nan if value is None else float(value)


def _raw(dim: int, scale: float, floor: float = FLOOR) -> Tensor:
    return _unfactor(scale * torch.eye(dim), floor)
