"""Votes counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyonn_jax.arc.augment import DIHEDRALS, Augmentation
from tinyonn_jax.arc.tokens import END, ROW, SEP, encode
from tinyonn_jax.arc.vote import Answer, read, vote

INPUT = np.array([[1, 2]], np.int8)
SWAP = Augmentation(0, (0, 2, 1, 3, 4, 5, 6, 7, 8, 9))


def spell(grid):
    return np.array([token for row in grid for token in [*row, ROW]] + [END])


def answer(grid, logprob=-1.0, view=Augmentation()):  # noqa: B008
    return Answer(view, spell(grid), logprob)


def result(candidates):
    return [(c.grid.tolist(), c.votes, c.logprob) for c in candidates]


def test_counts_then_mean_log_probability_then_content():
    answers = [
        answer([[3]], -9.0),
        answer([[4]], -1.0),
        answer([[5]], -2.0),
        answer([[3]], -7.0),
        answer([[6]], -2.0),
        answer([[7]], -1.0),
        answer([[7]], -2.0),
    ]
    expected = [([[7]], 2, -1.5), ([[3]], 2, -8.0), ([[4]], 1, -1.0), ([[5]], 1, -2.0), ([[6]], 1, -2.0)]
    assert result(vote(INPUT, answers)) == expected
    assert result(vote(INPUT, answers[::-1])) == expected  # the order of the answers does not matter


def test_the_mean_and_not_the_sum_breaks_ties():
    answers = [answer([[3]], -4.0), answer([[3]], -1.0), answer([[4]], -2.0), answer([[4]], -2.5)]
    assert result(vote(INPUT, answers)) == [([[4]], 2, -2.25), ([[3]], 2, -2.5)]


def test_views_are_inverted_before_counting():
    turned = Augmentation(1)  # a quarter turn anticlockwise: [[3, 4]] becomes [[4], [3]]
    answers = [answer([[4], [3]], view=turned), answer([[3, 4]]), answer([[1, 8]], view=SWAP)]
    assert result(vote(INPUT, answers)) == [([[3, 4]], 2, -1.0), ([[2, 8]], 1, -1.0)]


def test_copies_of_the_input_are_discarded_in_every_view():
    assert vote(INPUT, [answer([[1, 2]]), answer([[2, 1]], view=SWAP), answer([[2], [1]], view=Augmentation(1))]) == ()
    assert result(vote(INPUT, [answer([[1], [2]])])) == [([[1], [2]], 1, -1.0)]  # same cells, other shape


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [END],
        [ROW, END],
        [1, ROW],
        [1, END],
        [1, ROW, 2, END],
        [1, ROW, 2, 3, ROW, END],
        [1, 2, ROW, 3, ROW, END],
        [1, SEP, ROW, END],
        [1] * 31 + [ROW, END],
    ],
)
def test_malformed_answers_are_discarded(tokens):
    bad = Answer(Augmentation(), np.array(tokens, np.int32), 0.0)
    assert read(bad) is None
    assert result(vote(INPUT, [bad, bad, answer([[3]])])) == [([[3]], 1, -1.0)]


def test_every_vote_starts_empty():
    first = vote(INPUT, [answer([[3]])] * 3)
    assert result(vote(INPUT, [answer([[4]])])) == [([[4]], 1, -1.0)]
    assert result(first) == [([[3]], 3, -1.0)]
    assert vote(INPUT, []) == ()


def rows(width):
    return st.lists(st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=4)


@given(
    grid=st.integers(1, 4).flatmap(rows),
    views=st.lists(st.tuples(st.integers(0, DIHEDRALS - 1), st.permutations(range(10))), min_size=1, max_size=5),
)
def test_views_of_one_grid_agree(grid, views):
    original = np.array(grid, np.int8)
    views = [Augmentation(dihedral, tuple(permutation)) for dihedral, permutation in views]
    answers = [Answer(v, encode([], INPUT, v.apply(original)).tokens[5:], -float(i)) for i, v in enumerate(views)]
    candidates = vote(INPUT, answers)
    if grid == INPUT.tolist():
        assert candidates == ()
    else:
        (only,) = candidates
        assert only.grid.tolist() == grid and only.votes == len(views)
        assert math.isclose(only.logprob, -(len(views) - 1) / 2, abs_tol=1e-12)
