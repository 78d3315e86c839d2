import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinyonn_jax.arc.augment import INVERSE, Augmentation, free_colours, transform, views
from tinyonn_jax.arc.tasks import Pair, Task

L = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(lambda shape: arrays(np.int8, shape, elements=st.integers(0, 9)))


def pair(input, output=None):
    return Pair(np.array(input, np.int8), None if output is None else np.array(output, np.int8))


def test_transforms_worked_by_hand():
    expected = [
        [[1, 2, 3], [4, 5, 6]],
        [[3, 6], [2, 5], [1, 4]],
        [[6, 5, 4], [3, 2, 1]],
        [[4, 1], [5, 2], [6, 3]],
        [[1, 4], [2, 5], [3, 6]],
        [[4, 5, 6], [1, 2, 3]],
        [[6, 3], [5, 2], [4, 1]],
        [[3, 2, 1], [6, 5, 4]],
    ]
    assert [transform(d, L).tolist() for d in range(8)] == expected


def test_transforms_are_a_group():
    square = np.arange(9).reshape(3, 3)
    images = [transform(d, square).tobytes() for d in range(8)]
    assert len(set(images)) == 8
    table = [[images.index(transform(b, transform(a, square)).tobytes()) for b in range(8)] for a in range(8)]
    assert all(sorted(row) == list(range(8)) for row in table)
    assert all(table[a][INVERSE[a]] == 0 for a in range(8))


@given(grids, st.integers(0, 7), st.permutations(range(10)))
def test_views_are_undone(grid, dihedral, permutation):
    view = Augmentation(dihedral, tuple(permutation))
    np.testing.assert_array_equal(view.invert(view.apply(grid)), grid)
    before, after = (np.bincount(g.ravel(), minlength=10) for g in (grid, view.apply(grid)))
    np.testing.assert_array_equal(after[permutation], before)


def test_free_colours():
    demonstrations = [pair([[0, 1]], [[1, 3]]), pair([[2]], [[4]]), pair([[4]], [[0]])]
    # 3 and 4 come from nowhere, although another demonstration's input has 4: always 2 becomes 4, whatever was permuted.
    assert free_colours(demonstrations).tolist() == [False, True, True, False, False] + [True] * 5
    assert not free_colours(demonstrations, permute_zero=True)[0]  # the last one's 0
    assert free_colours(demonstrations[:2], permute_zero=True)[0]


def test_test_outputs_do_not_matter():
    demonstrations = (pair([[1]], [[2]]),)
    one, two = (Task("t", demonstrations, (pair([[1]], output),)) for output in ([[3]], None))
    assert views(one, 16, 0) == views(two, 16, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_views_are_distinct_valid_and_stable(seed):
    task = Task("t", (pair([[0, 1, 2]], [[5, 1, 2]]),), (pair([[3, 1, 0]]),))
    found = views(task, 40, seed)
    assert found[0] == Augmentation() and len(found) == 40
    assert found == views(task, 40, seed) and found[:16] == views(task, 16, seed)
    assert found != views(task, 40, seed + 2)
    assert all(view.permutation[0] == 0 and view.permutation[5] == 5 for view in found)
    seen = (task.train[0].input, task.test[0].input)
    shown = {(view.dihedral, *(view.apply(grid).tobytes() for grid in seen)) for view in found}
    assert len(shown) == 40
    assert np.bincount([view.dihedral for view in found[:16]]).tolist() == [2] * 8
    assert views(Task("u", task.train, task.test), 40, seed) != found


def test_a_colour_of_the_test_input_alone_gives_views():
    alone = Task("t", (pair([[0]], [[0]]),), (pair([[5]]),))
    assert {view.permutation[5] for view in views(alone, 100, 0)} == set(range(1, 10)) and len(views(alone, 100, 0)) == 72


def test_few_colours_give_few_views():
    fixed = Task("t", (pair([[0]], [[1]]),), (pair([[0]]),))
    assert sorted(view.dihedral for view in views(fixed, 100, 0)) == list(range(8))
    outputs = [pair([[0, 1]], [[2, 3, 4, 5, 6, 7, 8]])]  # 1 and 9 are free, 1 is seen: it stays or becomes 9
    found = views(Task("t", tuple(outputs), (pair([[0]]),)), 100, 0)
    assert {(v.dihedral, v.permutation[1]) for v in found} == set(itertools.product(range(8), (1, 9))) and len(found) == 16
