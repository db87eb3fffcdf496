"""A memory runs a sequence at once or folds it step by step: the same numbers, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from dynavae.nn import Bidirectional, Memory
from dynavae.nn.memory import Empty, reverse

CELLS = ("gru", "lstm", "rnn", "relu_rnn")
OPTIONS = list(itertools.product(CELLS, (1, 2), (False, True)))
CLOSE = dict(rtol=1e-12, atol=1e-12)

pytestmark = pytest.mark.usefixtures("float64")


def memory(cell, layers=1, learned=False):
    m = Memory(3, 5, cell, layers, learned_initial=learned, orthogonal=learned)
    if m.start is not None:
        torch.nn.init.normal_(m.start)
    return m


def fold(m, u, state):
    out = []
    for u_t in u:
        state = m.step(state, u_t)
        out.append(m.read(state))
    return torch.stack(out), state


def leaves(state):
    return [part for layer in state for part in layer]


@pytest.mark.parametrize(("cell", "layers", "learned"), OPTIONS)
def test_run_equals_folding_step(cell, layers, learned):
    m, u = memory(cell, layers, learned), torch.randn(6, 4, 3)
    out, last = m.run(u)
    expected, state = fold(m, u, m.initial((4,)))
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(leaves(last), leaves(state), **CLOSE)
    torch.testing.assert_close(m.run(u, fused=False)[0], out, **CLOSE)
    weights = torch.randn_like(out)
    for a, b in zip(
        *(torch.autograd.grad((o * weights).sum(), list(m.parameters())) for o in (out, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(("cell", "layers", "learned"), OPTIONS)
def test_a_state_continues_the_sequence(cell, layers, learned):
    m, u = memory(cell, layers, learned), torch.randn(6, 4, 3)
    whole, last = m.run(u)
    first, state = m.run(u[:2])
    rest, end = m.run(u[2:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole, **CLOSE)
    torch.testing.assert_close(leaves(end), leaves(last), **CLOSE)


@pytest.mark.parametrize(("cell", "layers", "learned"), OPTIONS)
def test_before_is_the_output_one_step_earlier(cell, layers, learned):
    m, u = memory(cell, layers, learned), torch.randn(6, 4, 3)
    before, last = m.before(u)
    out, state = m.run(u)
    torch.testing.assert_close(before[0], m.read(m.initial((4,))), **CLOSE)
    torch.testing.assert_close(before[1:], out[:-1], **CLOSE)
    torch.testing.assert_close(leaves(last), leaves(state), **CLOSE)


@pytest.mark.parametrize(("cell", "layers", "learned"), OPTIONS)
def test_valid_keeps_the_state_at_each_sequence_s_own_end(cell, layers, learned):
    m, u, lengths = memory(cell, layers, learned), torch.randn(6, 3, 3), (6, 1, 4)
    valid = torch.arange(6).unsqueeze(-1) < torch.tensor(lengths)
    _, last = m.run(u, valid=valid)
    for b, n in enumerate(lengths):
        _, own = m.run(u[:n, b : b + 1])
        torch.testing.assert_close([a[b : b + 1] for a in leaves(last)], leaves(own), **CLOSE)


@pytest.mark.parametrize("cell", CELLS)
def test_particles_are_a_leading_axis_that_broadcasts(cell):
    m, u = memory(cell, 2), torch.randn(4, 3)
    state = tuple(tuple(torch.randn(7, 4, 5) for _ in layer) for layer in m.initial((7, 4)))
    stepped = m.step(state, u)
    for k in range(7):
        alone = m.step(tuple(tuple(part[k] for part in layer) for layer in state), u)
        torch.testing.assert_close([a[k] for a in leaves(stepped)], leaves(alone), **CLOSE)
    u = torch.randn(5, 7, 4, 3)
    out, _ = m.run(u)
    assert out.shape == (5, 7, 4, 5)
    torch.testing.assert_close(out[:, 2], m.run(u[:, 2])[0], **CLOSE)


def test_reverse_stays_within_each_length_and_is_its_own_inverse():
    u = torch.arange(5.0).reshape(5, 1, 1).expand(5, 3, 1)
    lengths = torch.tensor([5, 1, 3])
    back = reverse(u, lengths)
    assert back[:, :, 0].T.tolist() == [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [2, 1, 0, 3, 4]]
    torch.testing.assert_close(reverse(back, lengths), u)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_and_bidirectional_read_each_sequence_alone(cell):
    lengths = torch.tensor([6, 1, 4])
    u = torch.randn(6, 2, 3, 3)  # a particle axis too
    m, both = memory(cell), Bidirectional(3, 5, cell)
    back, around, ends = m.backward(u, lengths), both(u, lengths), both.ends(u, lengths)
    assert ends.shape == (2, 3, 10)
    for b, n in enumerate(lengths.tolist()):
        own = u[:n, :, b : b + 1]
        torch.testing.assert_close(back[:n, :, b : b + 1], m.run(own.flip(0))[0].flip(0), **CLOSE)
        torch.testing.assert_close(around[:n, :, b : b + 1], both(own, torch.tensor([n])), **CLOSE)
        ahead = both.forward_memory.run(own)[0][-1]
        behind = both.backward_memory.run(own.flip(0))[0][-1]
        torch.testing.assert_close(ends[:, b : b + 1], torch.cat([ahead, behind], -1), **CLOSE)


def test_empty_remembers_nothing():
    m = Empty()
    assert m.initial((2, 3)) == () and m.step((), torch.zeros(1)) == () and m.read(()) is None
    assert m.run(torch.zeros(4, 2, 1)) == (None, ()) and m.before(torch.zeros(4, 2, 1)) == (None, ())


def test_bad_options_are_answered():
    with pytest.raises(
        ValueError, match="unknown cell 'gruu' of a memory; choose one of gru, lstm, rnn, relu_rnn"
    ):
        Memory(3, 5, "gruu")
    with pytest.raises(ValueError, match="at least one layer; got layers=0"):
        Memory(3, 5, layers=0)


def test_dropout_is_between_layers_and_in_training_only():
    m, u = Memory(3, 5, layers=2, dropout=0.5), torch.randn(6, 4, 3)
    state = m.initial((4,))
    assert not torch.equal(m.run(u)[0], m.run(u)[0])
    assert not torch.equal(m.read(m.step(state, u[0])), m.read(m.step(state, u[0])))
    m.eval()
    torch.testing.assert_close(m.run(u)[0], fold(m, u, state)[0], **CLOSE)
    assert Memory(3, 5, dropout=0.5).dropout == 0.0  # one layer has nothing between
