"""Sequences: every rule about data, and the sentence that is said when one is broken."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynavae import Sequences

NAN = float("nan")


def ragged(**options):
    xs = [np.arange(6.0).reshape(3, 2), np.array([[9.0, NAN]]), np.full((2, 2), 5.0)]
    return Sequences.from_arrays(xs, **options)


def test_padding_lengths_and_masks():
    s = ragged(names=["a", "b", "c"])
    assert s.x.shape == (3, 3, 2) and s.lengths.tolist() == [3, 1, 2] and len(s) == 3
    assert s.steps == 3 and s.x_dim == 2 and s.frames == 6 and s.names == ("a", "b", "c")
    assert s.valid.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert s.observed[1].tolist() == [[True, False], [False, False], [False, False]]
    assert (s.x[~s.observed] == 0).all() and not s.complete and s[[0, 2]].complete


def test_one_padded_array_is_the_same_as_a_list():
    padded = np.full((3, 3, 2), 7.0)
    for i, row in enumerate(ragged().arrays()):
        padded[i, : len(row)] = row
    same = Sequences.from_arrays(padded, lengths=[3, 1, 2])
    assert torch.equal(same.x, ragged().x) and torch.equal(same.observed, ragged().observed)
    assert same.sha256() == ragged().sha256()


@pytest.mark.parametrize("fill", [NAN, 1e6, np.inf])
def test_what_is_not_observed_may_hold_anything(fill):
    x = np.ones((2, 3, 2))
    observed = np.ones((2, 3, 2), dtype=bool)
    observed[0, 1, 0] = False
    reference = Sequences.from_arrays(x, observed=observed)
    x[0, 1, 0] = fill
    assert torch.equal(Sequences.from_arrays(x, observed=observed).x, reference.x)


def test_observed_may_be_given_for_whole_frames():
    s = Sequences.from_arrays(
        np.ones((2, 3, 2)), observed=np.array([[True, False, True], [True, True, True]])
    )
    assert s.observed[0].tolist() == [[True, True], [False, False], [True, True]]
    by_list = Sequences.from_arrays(
        [np.ones((3, 2)), np.ones((1, 2))], observed=[[True, False, True], [True]]
    )
    assert by_list.observed[0, 1].tolist() == [False, False]


def test_arrays_round_trip():
    for a, b in zip(ragged().arrays(), ragged().arrays(), strict=True):
        np.testing.assert_array_equal(a, b)
    again = Sequences.from_arrays(ragged().arrays())
    assert again.sha256() == ragged().sha256()
    assert np.isnan(ragged().arrays()[1][0, 1])


def test_selection_pads_to_its_own_longest():
    s = ragged(control=[np.ones((3, 1)), np.ones((1, 1)), np.ones((2, 1))])
    assert s[1].steps == 1 and s[1:].steps == 2 and s[[2, 0]].lengths.tolist() == [2, 3]
    assert s[[2, 0]].names == ("2", "0") and s[1:].control.shape == (2, 2, 1)
    assert [one.steps for one in s] == [3, 1, 2]
    assert s[[0] * 4].x.shape == (4, 3, 2)
    with pytest.raises(ValueError, match="leaves none of the 3 sequences"):
        s[[]]


def test_moves_change_floats_only():
    s = ragged(control=[np.ones((3, 1)), np.ones((1, 1)), np.ones((2, 1))]).to(torch.float64)
    assert s.x.dtype == torch.float64 and s.control.dtype == torch.float64
    assert s.observed.dtype == torch.bool and s.lengths.dtype == torch.int64


def test_types():
    assert ragged().x.dtype == torch.float32
    assert Sequences.from_arrays(torch.ones(1, 2, 1, dtype=torch.float64)).x.dtype == torch.float64
    assert Sequences.from_arrays(np.ones((1, 2, 1)), dtype=torch.float64).x.dtype == torch.float64
    assert Sequences.from_arrays(np.ones((1, 2, 3), dtype=np.uint8)).x.dtype == torch.float32
    assert Sequences.from_arrays(np.ones((2, 3, 4, 5))).x_dim == 20


def test_hide_only_adds_missing_values():
    s = ragged()
    hidden = torch.zeros_like(s.observed)
    hidden[0, 1] = True
    fewer = s.hide(hidden)
    assert (fewer.x[0, 1] == 0).all() and not fewer.observed[0, 1].any()
    assert not fewer.observed[1, 0, 1] and fewer.observed[0, 0].all()
    assert s.observed[0, 1].all()


def test_hash_depends_on_content_and_not_on_padding():
    s = ragged()
    assert s[0].sha256() == Sequences.from_arrays([s.arrays()[0]]).sha256()
    assert s.sha256() != s[[1, 0, 2]].sha256()
    assert s.sha256() != s.hide(torch.ones_like(s.observed) & (torch.arange(3) == 1)[None, :, None]).sha256()
    control = [np.ones((3, 1)), np.ones((1, 1)), np.ones((2, 1))]
    assert ragged(control=control).sha256() != s.sha256()


X = np.ones((2, 3, 2))
LIST = [np.ones((3, 2)), np.ones((2, 2))]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((3, 2)), {}, r"should have shape \(B, T, x_dim\) .* got \(3, 2\).*pass \[x\]"),
        ([], {}, "there are no sequences: x is empty"),
        (np.ones((0, 3, 2)), {}, "there are no sequences"),
        ([np.ones(3)], {}, r"sequence 0 should have shape \(T, x_dim\); got \(3,\).*add an axis"),
        ([np.ones((3, 2)), np.ones((0, 2))], {}, "sequence 1 has length 0; drop it"),
        (X, {"lengths": [3, 0]}, "sequence 1 has length 0; drop it"),
        (X, {"lengths": [3, 4]}, r"lengths should hold 2 numbers from 1 to 3; got \[3, 4\]"),
        (X, {"lengths": [3]}, "lengths should hold 2 numbers"),
        (LIST, {"lengths": [3, 2]}, "a list of arrays carries its own"),
        ([np.ones((3, 2)), np.ones((3, 4))], {}, r"sequence 0 has \(2,\) per frame, sequence 1 has \(4,\)"),
        (
            [[[1.0], [np.inf]]],
            {},
            "sequence 0 holds an infinite value, first at t=1; mark missing values as NaN",
        ),
        ([[[NAN], [NAN]]], {}, r"sequence 0 has no observed value \(all 2 frames are missing\)"),
        (X, {"observed": np.zeros((2, 3), bool)}, "sequence 0 has no observed value"),
        (
            X,
            {"observed": np.ones((2, 4), bool)},
            r"observed should start with \(B, T\) = \(2, 3\); got \(2, 4\)",
        ),
        (LIST, {"observed": [np.ones((3, 2), bool)]}, "observed should hold one array for each of the 2"),
        (LIST, {"observed": [np.ones(3), np.ones(1)]}, r"observed of sequence 1 .* \(2, 2\), or \(2,\)"),
        (X, {"control": np.ones((2, 2, 1))}, r"control should start with \(B, T\)"),
        (
            LIST,
            {"control": [np.ones((3, 1)), np.ones((3, 1))]},
            r"control of sequence 1 .* \(2, 1\); got \(3, 1\)",
        ),
        (
            LIST,
            {"control": [np.ones((3, 1)), np.ones((2, 2))]},
            r"control of sequence 1 .* \(2, 1\); got \(2, 2\)",
        ),
        (
            LIST,
            {"control": [np.full((3, 1), NAN), np.ones((2, 1))]},
            "control of sequence 0 holds NaN or inf",
        ),
        (X, {"names": ["a"]}, "one name for each of the 2 sequences; got 1"),
    ],
)
def test_bad_values_are_answered(x, options, message):
    with pytest.raises(ValueError, match=message):
        Sequences.from_arrays(x, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (3.0, r"should be an array \(B, T, x_dim\) or a list of arrays \(T_i, x_dim\); got float"),
        ([[["a"]]], "sequence 0 of x should hold numbers in a regular array"),
        ([[[1.0], [1.0, 2.0]]], "sequence 0 of x should hold numbers in a regular array"),
    ],
)
def test_what_is_not_numbers_is_answered(x, message):
    with pytest.raises(TypeError, match=message):
        Sequences.from_arrays(x)
