import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinyonn_jax.arc.tokens import END, ROW, SEP, START, decode, encode, pair_length

sides = st.integers(1, 30)
grids = st.tuples(sides, sides).flatmap(lambda shape: arrays(np.int8, shape, elements=st.integers(0, 9)))
IN, OUT = np.array([[1, 2]], np.int8), np.array([[3], [4]], np.int8)


def test_pair_worked_by_hand():
    tokens, positions, prefix = encode((), IN, OUT)
    assert tokens.tolist() == [START, 1, 2, ROW, SEP, 3, ROW, 4, ROW, END]
    assert positions.tolist() == [
        [0, 0, 0], [0, 0, 1], [1, 0, 1], [2, 0, 1], [0, 0, 2], [0, 0, 3], [1, 0, 3], [0, 1, 3], [1, 1, 3], [0, 0, 4]
    ]  # fmt: skip
    assert prefix == 5


def test_context_worked_by_hand():
    tokens, positions, prefix = encode([(IN, OUT)], OUT, IN)
    shown = [START, 1, 2, ROW, SEP, 3, ROW, 4, ROW, END]
    assert tokens.tolist() == [*shown, START, 3, ROW, 4, ROW, SEP, 1, 2, ROW, END]
    assert positions[:, 2].tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 5, 6, 6, 6, 6, 7, 8, 8, 8, 9]
    assert positions[10:16, :2].tolist() == [[0, 0], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]]
    assert prefix == 16


@given(grids, grids)
def test_round_trip(input, output):
    tokens, positions, prefix = encode((), input, output)
    assert len(tokens) == len(positions) == pair_length(input, output)
    assert tokens[0] == START and tokens[prefix - 1] == SEP and tokens[-1] == END
    np.testing.assert_array_equal(decode(tokens[prefix:]), output)
    cells = positions[:, 2] == 1
    x, y = positions[cells, 0], positions[cells, 1]
    colours = x < input.shape[1]
    np.testing.assert_array_equal(tokens[cells][colours], input[y[colours], x[colours]])
    assert np.all(tokens[cells][~colours] == ROW)


@given(grids, grids)
def test_prompt_is_the_start_of_the_sequence(input, output):
    whole, prompt = encode([(output, input)], input, output), encode([(output, input)], input)
    assert prompt.prefix == whole.prefix == len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[: whole.prefix])
    np.testing.assert_array_equal(prompt.positions, whole.positions[: whole.prefix])


def test_a_context_of_thousands_of_demonstrations_is_encoded():
    """To be left out for its length by who asked; grids are numbered beyond what 16 bits hold."""
    dot = np.zeros((1, 1), np.int8)
    assert encode([(dot, dot)] * 8000, dot, dot).positions[-1, 2] > 2**15


def test_longest_pair():
    full = np.zeros((30, 30), np.int8)
    assert 1863 == pair_length(full, full) == len(encode((), full, full).tokens)


def test_tokens_after_end_are_ignored():
    np.testing.assert_array_equal(decode(np.array([3, ROW, END, START, 7])), [[3]])


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [END],
        [ROW, END],
        [ROW, ROW, END],
        [1, 2, ROW],
        [1, 2, END],
        [1, ROW, 2, END],
        [1, 2, ROW, 3, ROW, END],
        [1, ROW, 2, 3, ROW, 4, 5, ROW, END],
        [1, SEP, ROW, END],
        [START, ROW, END],
        [14, ROW, END],
        [-1, ROW, END],
        [1] * 31 + [ROW, END],
        [1, ROW] * 31 + [END],
    ],
)
def test_malformed_answers_are_none(answer):
    assert decode(np.array(answer, np.int32)) is None


@given(st.lists(st.integers(-1, 14), max_size=12))
def test_whatever_decodes_encodes_to_the_same_tokens(answer):
    grid = decode(np.array(answer, np.int32))
    if grid is not None:
        tokens, _, prefix = encode((), grid, grid)
        assert tokens[prefix:].tolist() == answer[: answer.index(END) + 1]
