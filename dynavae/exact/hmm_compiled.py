r"""The recursions of the hidden Markov model in machine code, on a CPU, by Numba (:mod:`dynavae.exact._hmm_kernels`).

The results are those of the loop over tensors (:mod:`dynavae.exact.hmm_loop`), and so are the gradients; derivatives of
derivatives go through that loop itself. Everything is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynavae.exact import hmm_loop
from dynavae.exact._algebra import ordinary
from dynavae.exact._native import Gradients, again, arrays, for_sequences
from dynavae.exact.markov_chain import valid_frames

Potentials = tuple[Tensor, Tensor, Tensor]


def forward(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor) -> Potentials:
    """log p(s_t | x_1:t), log p(s_t | x_1:t-1), log p(x_t | x_1:t-1)."""
    inputs = _double(log_initial, log_transition, log_emission)
    made: Potentials = _Forward.apply(*inputs, lengths)
    return _like(log_emission, *made)


def backward(log_transition: Tensor, log_emission: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Messages p(x_t:T | s_t), normalised over s_t, and the log of each step's normaliser."""
    messages, scales = _Backward.apply(*_double(log_transition, log_emission), lengths)
    return _like(log_emission, messages, scales)


@torch.no_grad()
def best_path(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor) -> Tensor:
    """The most probable states (T, B), for :func:`dynavae.exact.hmm.viterbi`."""
    from dynavae.exact import _hmm_kernels

    T, B, S = log_emission.shape
    inputs = _double(log_initial, log_transition, log_emission)
    path, log_joint = lengths.new_empty(T, B), inputs[2].new_empty(B)
    given = arrays(inputs[0].expand(B, S), inputs[1].expand(T, B, S, S), inputs[2], lengths, path, log_joint)
    for_sequences(_hmm_kernels.best_path, B, _work(T, B, S), lambda: given)
    return path


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor
    ) -> Potentials:
        from dynavae.exact import _hmm_kernels

        T, B, S = log_emission.shape
        out = torch.empty_like(log_emission), torch.empty_like(log_emission), log_emission.new_empty(T, B)
        inputs = log_initial.expand(B, S), log_transition.expand(T, B, S, S), log_emission
        given = arrays(*inputs, lengths, *out)
        for_sequences(_hmm_kernels.forward, B, _work(T, B, S), lambda: given)
        ctx.save_for_backward(*map(ordinary, (log_initial, log_transition, log_emission, lengths)), *out[:2])
        return out

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            *inputs, lengths = ctx.saved_tensors[:4]
            return *again(lambda *a: hmm_loop.forward(*a, valid_frames(a[-1], lengths)), inputs, of), None
        from dynavae.exact import _hmm_kernels

        *inputs, lengths, log_filtered, log_predicted = ctx.saved_tensors
        T, B, S = log_filtered.shape
        into = Gradients(inputs, (1, 2, 1))
        read = arrays(inputs[1].expand(T, B, S, S), lengths, log_filtered, log_predicted, *of)

        def given() -> tuple[Any, ...]:
            initial, transition, emission = into.more()
            return *read, *arrays(initial.expand(B, S), transition.expand(T, B, S, S), emission)

        for_sequences(_hmm_kernels.forward_adjoint, B, 2 * _work(T, B, S), given, into.most)
        return *into.total(), None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_transition: Tensor, log_emission: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        from dynavae.exact import _hmm_kernels

        T, B, S = log_emission.shape
        out = torch.empty_like(log_emission), log_emission.new_empty(T, B)
        given = arrays(log_transition.expand(T, B, S, S), log_emission, lengths, *out)
        for_sequences(_hmm_kernels.backward, B, _work(T, B, S), lambda: given)
        ctx.save_for_backward(*map(ordinary, (log_transition, log_emission, lengths)), out[0])
        return out

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            *inputs, lengths = ctx.saved_tensors[:3]
            return *again(lambda *a: hmm_loop.backward(*a, valid_frames(a[-1], lengths)), inputs, of), None
        from dynavae.exact import _hmm_kernels

        *inputs, lengths, messages = ctx.saved_tensors
        T, B, S = messages.shape
        into = Gradients(inputs, (2, 1))
        read = arrays(inputs[0].expand(T, B, S, S), lengths, messages, *of)

        def given() -> tuple[Any, ...]:
            transition, emission = into.more()
            return *read, *arrays(transition.expand(T, B, S, S), emission)

        for_sequences(_hmm_kernels.backward_adjoint, B, 2 * _work(T, B, S), given, into.most)
        return *into.total(), None


def _work(T: int, B: int, S: int) -> float:
    """Microseconds, about, of a recursion."""
    return T * B * (0.05 + 0.03 * S + 0.001 * S**2)


def _double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(a.double() for a in tensors)


def _like(a: Tensor, *tensors: Tensor) -> Any:
    return tuple(b.to(a.dtype) for b in tensors)
