"""What the conditionals say of all frames at once: the part of a scan that no recursion needs.

It is one function of tensors, so it can be compiled whole.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions import at
from dynavae.model import Past, Present, SequentialLVM


class Terms(NamedTuple):
    """Conditionals of all frames, and their log-densities (T, K, B) or broadcastable, nats."""

    p_z: Any
    p_x: Any
    log_prior: Tensor
    log_likelihood: Tensor
    log_proposal: Tensor
    kl: Tensor | None  # of each coordinate; None without a closed form


def terms(
    model: SequentialLVM,
    past: Past,
    present: Present,
    lengths: Tensor,
    x: Tensor,
    observed: Tensor | None,
    z: Tensor,
    q: Any,
    p_z: Any = None,
    p_x: Any = None,
) -> Terms:
    """Score z and x, (T, K, B, .), under what the model says of them; a factor that is given is not computed again."""
    if p_z is None:
        p_z = at(model.prior(past), z)
    if p_x is None:
        p_x = model.decode(present, lengths)
    return Terms(p_z, p_x, p_z.log_prob(z), p_x.log_prob(x, observed), q.log_prob(z), q.kl(p_z))


@functools.cache
def compiled() -> Callable[..., Terms]:
    """The same through `torch.compile`: fewer passes over memory, after some seconds for each kind of model."""
    if torch.cuda.is_available():  # Triton compiles what launches its kernels
        language, variable, compilers = "C", "CC", ("cc", "gcc", "clang")
    else:
        language, variable, compilers = "C++", "CXX", ("c++", "g++", "clang++")
    if not any(map(shutil.which, (os.environ.get(variable, ""), *compilers))):
        raise RuntimeError(
            f"compile=True (or 'terms') translates the scoring of all frames to {language}, and there is no {language} "
            f"compiler on the path: install one ({' or '.join(compilers[1:])}), name it in {variable}, or leave "
            "compile=False."
        )
    return torch.compile(terms, dynamic=True)
