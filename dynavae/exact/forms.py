r"""The forms in which the Kalman filter and smoother can be computed, and which one `method="auto"` takes.

| method | what it does | calls that follow one another |
|---|---|---|
| `joseph` | one step after the other, covariances in Joseph form | T |
| `square_root` | the same with factors of the covariances, by QR: accurate where covariances are not | T |
| `parallel` | an associative scan over time | 2 log T |
| `shared` | a constant model: covariances once for all sequences and until they are steady, means in blocks | 2 √T |
| `compiled` | `joseph` in machine code, on a CPU with Numba | 1 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynavae.exact import _native
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.compiled import compiled_filter, compiled_smoother
from dynavae.exact.joseph import joseph_filter, joseph_smoother
from dynavae.exact.linear_gaussian import LinearGaussian, observed_emission
from dynavae.exact.parallel import parallel_filter, parallel_smoother
from dynavae.exact.shared import one_for_all, shared_filter, shared_smoother, varying
from dynavae.exact.square_root import square_root_filter, square_root_smoother
from dynavae.tree import tree_map

FILTERS = {
    "joseph": joseph_filter,
    "square_root": square_root_filter,
    "parallel": parallel_filter,
}
SMOOTHERS = {
    "joseph": joseph_smoother,
    "square_root": square_root_smoother,
    "parallel": parallel_smoother,
    "shared": shared_smoother,
    "compiled": compiled_smoother,
}
SHARED_STEPS, SCAN_STEPS, SCAN_WORK = 12, 32, 300
"""Without Numba: from so many steps on `auto` shares, and scans; it scans at most SCAN_WORK / z_dim^2 sequences."""
COMPILED_WORK = 30_000
"""With it `auto` takes `compiled` where T B z_dim^2 is at most this, if sequences could share their covariances. Else"""
COMPILED_STATES, COMPILED_VARYING, COMPILED_BATCH = 40, 16, 2_000
"""for at most so many states, of a constant model and of one that varies, or at most COMPILED_BATCH / z_dim^2 sequences:
larger products are faster in BLAS."""
FEW_PATTERNS = 8
"""Sequences are taken to share their covariances if there are at least so many for each pattern of gaps."""


def choose(params: LinearGaussian, T: int, B: int, patterns: int = 0) -> str:
    """The form that `method="auto"` takes, by what was measured on a 2-core CPU (benchmarks/exact_forms.py).

    On a CPU with Numba `compiled`, unless covariances that a large batch shares (`shared`), or products of large matrices
    (`joseph`) are faster. Without it, for a constant model `shared`, the fastest from about 12 steps on, whatever the batch;
    for matrices that vary in time or over sequences `parallel` for long sequences in small batches of small states, where a
    loop is all overhead; else `joseph`. Never `square_root`: float32 is computed in float64 instead, which is as accurate
    and faster, except on a device that has no float64.

    Args:
        params: the model.
        T: steps.
        B: sequences.
        patterns: in how many ways they miss values; 0 if none is missing.

    Example:
        >>> I = torch.eye(2)
        >>> walk = LinearGaussian(m0=torch.zeros(2), P0=I, A=I, Q=I, C=I, R=I)
        >>> choose(walk, T=1000, B=64)
        'shared'
    """
    if params.m0.device.type == "mps":
        return "square_root"
    z, constant = params.m0.shape[-1], varying(params) is None
    if _native.applies(params.m0):
        if constant and FEW_PATTERNS * patterns <= B:
            return "compiled" if T * B * z**2 <= COMPILED_WORK else "shared"
        if z <= (COMPILED_STATES if constant else COMPILED_VARYING) or B * z**2 <= COMPILED_BATCH:
            return "compiled"
    if constant and T >= SHARED_STEPS:
        return "shared"
    return "parallel" if T >= SCAN_STEPS and B * z**2 <= SCAN_WORK else "joseph"


def patterns(observed: Tensor) -> int:
    """In how many ways sequences (T, B, x_dim) miss values; 0 if none is missing."""
    if bool(observed.all()):
        return 0
    if bool((observed == observed[:, :1]).all()):
        return 1
    return len(torch.unique(observed.transpose(0, 1).flatten(1), dim=0))


def check(method: str, params: LinearGaussian | None = None) -> None:
    """Raise an error unless `method` is "auto" or a form that applies to this model, and is installed."""
    if method not in ("auto", *SMOOTHERS):
        raise ValueError(
            f"method should be 'auto' or one of {', '.join(map(repr, SMOOTHERS))}; got {method!r}."
        )
    if method == "shared" and params is not None and varying(params) is not None:
        raise ValueError(
            f"method='shared' needs a model that is the same at all steps and for all sequences, but params."
            f"{varying(params)} is not; use method='auto'."
        )
    if method == "compiled" and params is not None and not _native.applies(params.m0):
        raise ValueError(
            "method='compiled' needs tensors on a CPU, and Numba (pip install 'dynavae[compiled]'); use method='auto'."
        )


def run_filter(
    method: str, params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor, g: Tensor
) -> Filtered:
    """The filter in this form; f (T, B, z_dim) and g (T, B, x_dim) are what is known of transitions and emissions."""
    wide = method in ("auto", "compiled") and x.dtype != torch.float64
    if method == "auto":
        method = choose(params, *f.shape[:2], patterns(observed))
    if not wide or method == "square_root":
        return _filter(method, params, x, observed, f, g)
    result = _filter(method, *(tree_map(_wide, a) for a in (params, x, observed, f, g)))
    return tree_map(lambda a: a.to(x.dtype), result)._replace(wide=result)


def _filter(
    method: str, params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor, g: Tensor
) -> Filtered:
    if method == "shared":
        free = params.B is None and params.b is None, params.D is None and params.d is None
        return shared_filter(params, x, observed, None if free[0] else f, None if free[1] else g)
    if method == "compiled":
        return compiled_filter(params, x, observed, f, g)
    return FILTERS[method](params, observed_emission(params, x, observed, g), f)


def run_smoother(method: str, params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """The smoother in this form."""
    if method not in ("auto", "compiled"):
        return SMOOTHERS[method](params, filtered)
    if method == "auto" and filtered.factor is not None:
        return square_root_smoother(params, filtered)
    dtype, source = filtered.mean.dtype, widened(filtered)
    if method == "compiled":
        source = tree_map(_wide, source)
    else:
        T, B, _ = source.mean.shape
        steady = torch.equal(source.covariance[-1, :1], source.covariance[-2:-1, 0])  # nothing was missing
        method = choose(params, T, B, B if not one_for_all(source) else 0 if steady else 1)
    params = tree_map(lambda a: a.to(source.mean.dtype), params)
    smoothed = SMOOTHERS[method](params, source)
    return tree_map(lambda a: a.to(dtype), smoothed)


def widened(filtered: Filtered) -> Filtered:
    """In float64, if that is how it was computed."""
    return filtered if filtered.wide is None else filtered.wide


def _wide(a: Tensor) -> Tensor:
    return a.double() if a.is_floating_point() else a
