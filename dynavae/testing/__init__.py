"""Laws that every model must keep, whatever it is: run them on a new model with `check_model`.

Each law is a function `law_<name>(build)`, where `build` makes the model anew at each call; it raises an
AssertionError with a sentence that names the model, the law and the numbers.

Example:
    >>> from dynavae.models import VAE
    >>> from dynavae.testing import law_factorisation, small
    >>> law_factorisation(lambda: small(VAE))
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable

from dynavae.model import SequentialLVM
from dynavae.testing.bounds import law_bounds, law_divergence, law_exact, law_generation, law_marginal
from dynavae.testing.cases import Case, cases, describe, sequences, small
from dynavae.testing.equality import law_chunks, law_fast_equals_slow
from dynavae.testing.factorisation import DependencyTable, dependency_table, law_docstring, law_factorisation
from dynavae.testing.hygiene import (
    law_checkpoint,
    law_copy,
    law_device,
    law_gradients,
    law_representation,
    law_seeds,
    law_sizes,
    law_types,
)
from dynavae.testing.leaks import law_batch, law_forecast, law_padding, law_rows, law_unseen
from dynavae.testing.learning import law_em
from dynavae.testing.streams import law_stream

Law = Callable[[Callable[[], SequentialLVM]], None]

LAWS: dict[str, Law] = {
    "fast_equals_slow": law_fast_equals_slow,
    "chunks": law_chunks,
    "factorisation": law_factorisation,
    "unseen": law_unseen,
    "forecast": law_forecast,
    "stream": law_stream,
    "padding": law_padding,
    "batch": law_batch,
    "rows": law_rows,
    "bounds": law_bounds,
    "divergence": law_divergence,
    "exact": law_exact,
    "em": law_em,
    "marginal": law_marginal,
    "generation": law_generation,
    "gradients": law_gradients,
    "sizes": law_sizes,
    "checkpoint": law_checkpoint,
    "copy": law_copy,
    "types": law_types,
    "seeds": law_seeds,
    "representation": law_representation,
}
"""Every law that needs no accelerator, by name. `law_device` is apart."""


def check_model(cls: type[SequentialLVM]) -> None:
    """Run every law on a class of models: its defaults, its variants, controls and several emissions.

    Args:
        cls: a model class. Its constructor should accept small sizes; see :func:`small`.

    Raises:
        AssertionError: at the first law that is broken, with the model, the law and the numbers.
    """
    checks = [(cls.__name__, "docstring", functools.partial(law_docstring, cls))]
    checks += [
        (case.name, name, functools.partial(law, case.build))
        for case in cases(cls)
        for name, law in LAWS.items()
    ]
    for case_name, law_name, check in checks:
        try:
            check()
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(_stopped(cls, case_name, law_name, error)) from error


def _stopped(cls: type[SequentialLVM], case: str, law: str, error: Exception) -> str:
    """Where in the model a law stopped, and what that usually means."""
    file = inspect.getfile(cls)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    where = (
        f"in {frames[-1].name}, line {frames[-1].lineno}"
        if frames
        else "in the engine, after its methods ran"
    )
    return (
        f"{case}: law {law} stopped {where}: {type(error).__name__}: {error}\n"
        "Check that layer sizes fit what is fed to them; that features are joined with dynavae.tree.cat, which "
        "broadcasts (B, .) against (K, B, .); that initial uses `lead`; that prior, likelihood and posterior return "
        "distributions; and that a method which reads past.prior is declared with reads_prior = True."
    )


__all__ = [
    "LAWS",
    "Case",
    "DependencyTable",
    "Law",
    "cases",
    "check_model",
    "dependency_table",
    "describe",
    "law_batch",
    "law_bounds",
    "law_checkpoint",
    "law_chunks",
    "law_copy",
    "law_device",
    "law_divergence",
    "law_docstring",
    "law_em",
    "law_exact",
    "law_factorisation",
    "law_fast_equals_slow",
    "law_forecast",
    "law_generation",
    "law_gradients",
    "law_marginal",
    "law_padding",
    "law_representation",
    "law_rows",
    "law_seeds",
    "law_sizes",
    "law_stream",
    "law_types",
    "law_unseen",
    "sequences",
    "small",
]
