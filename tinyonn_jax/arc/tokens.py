"""Grids to tokens and back: one serialiser for both sequence formats.

A `pair` sequence is START, the input's rows, SEP, the output's rows, END; each row is its cells, then ROW. A `context`
sequence is the pair sequences of all demonstrations, then that of the test pair. Positions are (x, y, z): z = 0 START, 1 input,
2 SEP, 3 output, 4 END, plus 5 for every pair before; (x, y) is the cell, ROW sits at x = width. Letters: T tokens, h rows,
w columns.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

COLOURS = 10
START, ROW, SEP, END = 10, 11, 12, 13
VOCAB = 14
MAX_SIDE = 30
Z_START, Z_INPUT, Z_SEP, Z_OUTPUT, Z_END, Z_PER_PAIR = range(6)

Format = Literal["pair", "context"]
Grid = Int[np.ndarray, "h w"]


class Encoded(NamedTuple):
    """One sequence. `prefix` counts the tokens up to and including the last SEP; what follows is to be predicted."""

    tokens: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T 3"]
    prefix: int


def grid_length(grid: Grid) -> int:
    """Tokens of one grid: its cells and one ROW for each row."""
    return grid.shape[0] * (grid.shape[1] + 1)


def prompt_length(input: Grid) -> int:
    """Tokens of one prompt: a grid between START and SEP."""
    return 2 + grid_length(input)


def pair_length(input: Grid, output: Grid) -> int:
    """Tokens of one pair: a prompt, the grid after it, END."""
    return prompt_length(input) + grid_length(output) + 1


def encode(demonstrations: Iterable[tuple[Grid, Grid]], input: Grid, output: Grid | None = None) -> Encoded:
    """The sequence of one pair (after its demonstrations, for `context`); without `output`, the prompt that ends with SEP."""
    blocks: list[np.ndarray] = []
    z = 0
    for shown, answer in demonstrations:
        blocks += [_mark(START, z), _cells(shown, z + Z_INPUT), _mark(SEP, z + Z_SEP)]
        blocks += [_cells(answer, z + Z_OUTPUT), _mark(END, z + Z_END)]
        z += Z_PER_PAIR
    blocks += [_mark(START, z), _cells(input, z + Z_INPUT), _mark(SEP, z + Z_SEP)]
    prefix = sum(map(len, blocks))
    if output is not None:
        blocks += [_cells(output, z + Z_OUTPUT), _mark(END, z + Z_END)]
    records = np.concatenate(blocks)
    return Encoded(records[:, 0], records[:, 1:], prefix)


def decode(answer: Int[np.ndarray, "T"]) -> Grid | None:
    """The grid that the tokens after SEP spell, or None.

    Reads up to the first END and ignores what follows. None if there is no END, if a token is neither colour nor ROW, if the last
    row is not closed, if rows differ in width, or if a side is not between 1 and 30 cells.
    """
    answer = np.asarray(answer)
    ends = np.flatnonzero(answer == END)
    if len(ends) == 0:
        return None
    body = answer[: ends[0]]
    rows = np.flatnonzero(body == ROW)
    if not 1 <= len(rows) <= MAX_SIDE or len(body) % len(rows):
        return None
    block = body.reshape(len(rows), -1)
    grid = block[:, :-1]
    regular = np.all(block[:, -1] == ROW) and np.all((grid >= 0) & (grid < COLOURS))
    return grid.astype(np.int8) if regular and 1 <= grid.shape[1] <= MAX_SIDE else None


def _mark(token: int, z: int) -> np.ndarray:
    return np.array([[token, 0, 0, z]], np.int32)


def _cells(grid: Grid, z: int) -> np.ndarray:
    """Records (token, x, y, z) of a grid's rows, each closed by ROW: int32 [h (w + 1), 4]."""
    h, w = grid.shape
    records = np.empty((h, w + 1, 4), np.int32)
    records[:, :w, 0] = grid
    records[:, w, 0] = ROW
    records[:, :, 1] = np.arange(w + 1)
    records[:, :, 2] = np.arange(h)[:, None]
    records[:, :, 3] = z
    return records.reshape(-1, 4)
