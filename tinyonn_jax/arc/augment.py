"""Views of a task under which it stays the same puzzle: the eight dihedral transforms × colour permutations.

Index d = 4·transposed + quarter turns, 0 = identity. Colour 0 and colours that some demonstration's output has and its own input
has not stay fixed: nothing in the input would tell where they went. Test outputs are never looked at.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from tinyonn_jax.arc.tasks import Pair, Task
from tinyonn_jax.arc.tokens import COLOURS, Grid

DIHEDRALS = 8
INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)
"""INVERSE[d] undoes d: a turn is undone by the opposite turn, a reflection by itself."""

_UNMOVED = tuple(range(COLOURS))


def transform(dihedral: int, grid: Grid) -> Grid:
    """The grid transposed if `dihedral` >= 4, then turned anticlockwise by `dihedral` % 4 quarters."""
    return np.rot90(grid.T if dihedral >= 4 else grid, dihedral % 4)


def turns_rows(dihedral: int) -> bool:
    """Whether rows of a grid become columns."""
    return (dihedral % 4 + dihedral // 4) % 2 == 1


@dataclass(frozen=True)
class Augmentation:
    """One view: a dihedral transform (0..7) and the colour that each of the ten colours becomes."""

    dihedral: int = 0
    permutation: tuple[int, ...] = _UNMOVED

    def apply(self, grid: Grid) -> Grid:
        """The grid in this view."""
        return transform(self.dihedral, np.array(self.permutation, np.int8)[grid])

    def invert(self, grid: Grid) -> Grid:
        """The grid that this view shows as `grid`."""
        return transform(INVERSE[self.dihedral], np.argsort(self.permutation).astype(np.int8)[grid])


def free_colours(demonstrations: Sequence[Pair], permute_zero: bool = False) -> Bool[np.ndarray, "10"]:
    """The colours that may be permuted: all but 0 (unless `permute_zero`) and but those that a demonstration makes, which are in
    its output and not in its input."""
    made = np.zeros(COLOURS, bool)
    for pair in demonstrations:
        if pair.output is not None:
            made |= _used([pair.output]) & ~_used([pair.input])
    made[0] |= not permute_zero
    return ~made


def views(task: Task, n: int, seed: int, permute_zero: bool = False) -> list[Augmentation]:
    """Up to n views of a task to vote over, the first the identity. They follow from task and seed; a longer list begins alike.

    Any two differ in the dihedral transform or in a colour that the task shows (demonstrations, test inputs): a task with few
    colours may have fewer than n. Dihedral transforms take turns, so that n = 16 shows each twice.
    """
    rng = np.random.default_rng((seed, zlib.crc32(task.id.encode())))
    free = np.flatnonzero(free_colours(task.train, permute_zero))
    used = np.flatnonzero(_used(task.visible))
    recolourings = math.perm(len(free), len(np.intersect1d(free, used)))
    turns = [0, *rng.permutation(np.arange(1, DIHEDRALS)).tolist()]
    found = {(0, tuple(used.tolist())): Augmentation()}
    while len(found) < min(n, DIHEDRALS * recolourings):
        dihedral = turns[len(found) % DIHEDRALS]
        permutation = np.arange(COLOURS)
        permutation[free] = rng.permutation(free)
        found.setdefault((dihedral, tuple(permutation[used].tolist())), Augmentation(dihedral, tuple(permutation.tolist())))
    return list(found.values())


def _used(grids: Sequence[Grid]) -> Bool[np.ndarray, "10"]:
    """Which colours occur in any of the grids."""
    used = np.zeros(COLOURS, bool)
    for grid in grids:
        used[grid] = True
    return used
