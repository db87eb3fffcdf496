r"""The forms in which the Kalman filter and smoother can be computed, and which one `method="auto"` takes.

| method | what it does | steps that follow one another |
|---|---|---|
| `joseph` | one step after the other, covariances in Joseph form | T |
| `square_root` | the same with factors of the covariances, by QR | T |
| `parallel` | an associative scan over time | 2 log T |
"""

from __future__ import annotations

from torch import Tensor

from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.joseph import joseph_filter, joseph_smoother
from dynavae.exact.linear_gaussian import Emission, LinearGaussian
from dynavae.exact.parallel import parallel_filter, parallel_smoother
from dynavae.exact.square_root import square_root_filter, square_root_smoother

FILTERS = {"joseph": joseph_filter, "square_root": square_root_filter, "parallel": parallel_filter}
SMOOTHERS = {"joseph": joseph_smoother, "square_root": square_root_smoother, "parallel": parallel_smoother}


def check(method: str) -> None:
    """Raise an error unless `method` is the name of a form, or "auto"."""
    if method not in ("auto", *FILTERS):
        raise ValueError(
            f"method should be 'auto' or one of {', '.join(map(repr, FILTERS))}; got {method!r}."
        )


def run_filter(method: str, params: LinearGaussian, emission: Emission, f: Tensor) -> Filtered:
    """The filter in this form; `f` (T, B, z_dim) is what is known of each transition."""
    return FILTERS["joseph" if method == "auto" else method](params, emission, f)


def run_smoother(method: str, params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """The smoother in this form."""
    if method == "auto":
        method = "joseph" if filtered.factor is None else "square_root"
    return SMOOTHERS[method](params, filtered)
