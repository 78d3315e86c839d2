"""Continual learning: measures worked by hand, stages that share no task, tests that are never trained on."""

import dataclasses

import jax
import numpy as np
import pytest

from tinyonn_jax.arc.augment import DIHEDRALS
from tinyonn_jax.arc.batches import batch_at, build_dataset
from tinyonn_jax.arc.continual import build_stages, measures
from tinyonn_jax.arc.sets import TaskSets, load_task_sets
from tinyonn_jax.arc.tasks import DataError, Pair
from tinyonn_jax.config import Config, ConfigError, DataConfig
from tinyonn_jax.presets import PRESETS

DATA = dataclasses.replace(PRESETS["smoke"][1].data, sequence=3, buckets=(48,))


@pytest.fixture(scope="module")
def sets() -> TaskSets:
    return load_task_sets(DATA)


def test_measures_by_hand():
    matrix = np.array(
        [
            [0.1, 0.2, 0.3],  # before any learning
            [0.9, 0.3, 0.2],
            [0.5, 0.8, 0.5],
            [0.6, 0.7, 1.0],
        ]
    )
    assert measures(matrix) == pytest.approx(
        {
            "average_accuracy": (0.6 + 0.7 + 1.0) / 3,
            "learning_accuracy": (0.9 + 0.8 + 1.0) / 3,
            "forgetting": ((0.9 - 0.6) + (0.8 - 0.7)) / 2,
            "backward_transfer": ((0.6 - 0.9) + (0.7 - 0.8)) / 2,
            "forward_transfer": ((0.3 - 0.2) + (0.5 - 0.3)) / 2,
        }
    )


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_own_stage():
    matrix = np.array([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.9, 0.5, 0.0], [0.7, 0.5, 0.5]])  # stage 1 got better by stage 2
    found = measures(matrix)
    assert found["forgetting"] == pytest.approx((0.9 - 0.7 + 0) / 2)
    assert found["backward_transfer"] == pytest.approx((0.7 - 0.5 + 0) / 2)


def learned(dataset) -> set[int]:
    """Rows of the task embedding that a dataset shows in its first epoch."""
    return {int(t) for step in range(dataset.steps_per_epoch) for t in batch_at(dataset, 0, step).task} - {-1}


def test_inputs_of_unknown_answer_test_nothing(sets):
    first, *others = sets.evaluation
    more = dataclasses.replace(first, test=(*first.test, Pair(first.test[0].input, None)))
    found, want = (build_stages(s, DATA, 30, 0).tests for s in (dataclasses.replace(sets, evaluation=(more, *others)), sets))
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_every_task_has_one_stage(sets):
    stages = build_stages(sets, DATA, 30, seed=0)
    rows = [learned(dataset) for dataset in stages.datasets]
    assert sorted(row for group in rows for row in group) == list(range(len(sets.tasks)))
    other = [learned(dataset) for dataset in build_stages(sets, DATA, 30, seed=1).datasets]
    assert other != rows, "the order is the seed's"
    assert [learned(dataset) for dataset in build_stages(sets, DATA, 30, seed=0).datasets] == rows


def test_a_stage_is_tested_on_the_test_inputs_of_its_own_tasks_in_eight_views(sets):
    stages = build_stages(sets, DATA, 30, seed=0, multiple=16)
    assert len({batch.tokens.shape for test in stages.tests for batch in test}) == 1, "one program"
    for dataset, test in zip(stages.datasets, stages.tests, strict=True):
        assert all(len(batch.task) % 16 == 0 for batch in test)
        test = jax.tree.map(lambda *parts: np.concatenate(parts), *test)
        real = test.length > 0
        assert set(test.task[real].tolist()) == learned(dataset)
        names = {sets.task_ids[row] for row in learned(dataset)}
        assert real.sum() == DIHEDRALS * sum(len(task.test) for task in sets.evaluation if task.id in names)
        trained = {
            tuple(tokens[:length]) for tokens, length in zip(*everything(dataset), strict=True)
        }  # all eight views of all that is learned from, in their own colours
        asked = {tuple(tokens[:length]) for tokens, length in zip(test.tokens[real], test.length[real], strict=True)}
        assert not asked & trained


def test_tests_keep_to_the_budget_and_to_the_views_that_are_learned(sets):
    whole = build_stages(sets, DATA, 30, seed=0)
    few = build_stages(sets, dataclasses.replace(DATA, tokens_per_batch=4 * DATA.buckets[-1]), 30, seed=0)
    for many, test in zip(few.tests, whole.tests, strict=True):
        assert len(many) > 1 and all(len(batch.task) == 4 for batch in many)
        found, want = (jax.tree.map(lambda *parts: np.concatenate(parts), *batches) for batches in (many, test))
        np.testing.assert_array_equal(found.tokens[found.length > 0], want.tokens[want.length > 0])
    plain = build_stages(sets, dataclasses.replace(DATA, augment=False), 30, seed=0)
    assert all(not batch.dihedral.any() for test in plain.tests for batch in test)


def everything(dataset):
    layouts = dataset.training
    tokens = layouts.records.view(np.int16).reshape(-1, 4)[:, 0]
    flat = [(tokens[s : s + n], n) for s, n in zip(layouts.start.ravel(), layouts.length.ravel(), strict=True)]
    return [t for t, _ in flat], [n for _, n in flat]


def test_steps_fall_to_stages_in_turn(sets):
    stages = build_stages(sets, DATA, 30, seed=0)
    for step in (0, 9, 10, 29):
        want = batch_at(stages.datasets[step // 10], 5, step % 10)
        np.testing.assert_array_equal(stages.batch_at(5, step).tokens, want.tokens)
    whole = build_dataset(sets, DATA)
    assert learned(whole) == set(range(len(sets.tasks)))


@pytest.mark.parametrize(("sequence", "buckets"), [(7, (48,)), (3, (16,))])
def test_stages_without_a_test_are_refused(sets, sequence, buckets):
    with pytest.raises(DataError, match="every stage needs a test output"):
        build_stages(sets, dataclasses.replace(DATA, sequence=sequence, buckets=buckets), 70, seed=0)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="must be 0 or at least 2"):
        DataConfig(sequence=1)
    with pytest.raises(ConfigError, match="holdout must be false"):
        DataConfig(sequence=2, holdout=True)
    with pytest.raises(ConfigError, match="must be a multiple of"):
        Config(data=DataConfig(sequence=7))
