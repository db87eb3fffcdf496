"""The law of EM: log p(x) never falls, and the sums of an expectation add up."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from dynavae import em
from dynavae.model import SequentialLVM
from dynavae.tasks.capabilities import refusal
from dynavae.testing.cases import compare, describe, require, sequences

ITERATIONS = 8


def law_em(build: Callable[[], SequentialLVM]) -> None:
    """Every iteration of EM raises the log-likelihood of the model itself, complete and with gaps; batches add up.

    For models with the attribute `closed_form_em`; the others refuse with a sentence.
    """
    law, model = "EM never falls", build()
    if not model.closed_form_em:
        sentence = refusal(model, "em")
        require(sentence is not None and "M-step" in sentence, law, model, f"it refuses with: {sentence}")
        return
    for missing in (False, True):
        model = build()
        whole = sequences(model, (9, 1, 12, 5), missing)
        parts = [whole[[0, 2]], whole[[1, 3]]]
        together, apart = model.expectation(whole), None
        for part in parts:
            apart = em.add(apart, model.expectation(part))
        compare(law, model, "the sums of two batches and of all", apart, together, 1e-8)
        values = [em.step(model, parts) for _ in range(ITERATIONS)]
        with torch.no_grad():
            values.append(float(model.exact_log_likelihood(whole).sum()))
            first = float(build().exact_log_likelihood(whole).sum())
        compare(
            law,
            model,
            "the log-likelihood that EM starts from",
            torch.tensor(values[0]),
            torch.tensor(first),
            1e-8,
        )
        for i, (before, after) in enumerate(itertools.pairwise(values)):
            slack = 1e-8 * (1 + abs(before))
            if not after >= before - slack:  # NaN fails too
                raise AssertionError(
                    f"{describe(model)} breaks '{law}': iteration {i + 1} took log p(x) from {before:.10g} to {after:.10g}, "
                    f"with {'missing' if missing else 'complete'} data."
                )
        require(values[-1] > values[0], law, model, "EM gained nothing from generic parameters.")
