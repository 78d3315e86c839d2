"""The submission, its validator and the scorer, worked by hand."""

import copy
import json
import re

import numpy as np
import pytest

from tinyonn_jax.arc.submission import (
    Prediction,
    Predictions,
    build_submission,
    save,
    score,
    to_json,
    validate_submission,
)
from tinyonn_jax.arc.tasks import DataError, Pair, Task
from tinyonn_jax.arc.vote import Candidate


def grid(*rows):
    return np.array(rows, np.int8)


def colour(c):
    return grid([c])


def prediction(truth, greedy, *candidates):
    """All grids one cell: their colour, or None; the input has colour 9."""
    found = tuple(Candidate(colour(c), 3 - i, -1.5 * i) for i, c in enumerate(candidates))
    return Prediction(colour(9), None if truth is None else colour(truth), None if greedy is None else colour(greedy), found)


# Solved by pass@1 and pass@2: task a 1 and 3 of 3, task b 1 and 1 of 1, task c 0 and 1 of 2, task d 0 and 0 of 1.
PREDICTIONS = Predictions(
    {
        "a": (prediction(1, 1, 1, 2), prediction(2, 3, 3, 2), prediction(3, None, 3)),
        "b": (prediction(4, 4, 4, 5, 6),),
        "c": (prediction(1, 2, 1), prediction(2, 0, 3, 4, 2)),  # the third candidate is right, but there are two attempts
        "d": (prediction(7, None),),
    },
    augmentations=16,
    checkpoint=40,
    too_long=("task d …",),
)
TASKS = [Task(name, (), tuple(Pair(p.input) for p in entries)) for name, entries in PREDICTIONS.tasks.items()]


def test_submission_by_hand():
    missing = [[9]]  # the input
    assert build_submission(PREDICTIONS) == {
        "a": [
            {"attempt_1": [[1]], "attempt_2": [[2]]},
            {"attempt_1": [[3]], "attempt_2": [[2]]},
            {"attempt_1": [[3]], "attempt_2": missing},
        ],
        "b": [{"attempt_1": [[4]], "attempt_2": [[5]]}],
        "c": [{"attempt_1": [[1]], "attempt_2": missing}, {"attempt_1": [[3]], "attempt_2": [[4]]}],
        "d": [{"attempt_1": missing, "attempt_2": missing}],
    }
    validate_submission(build_submission(PREDICTIONS), TASKS)


def test_score_by_hand():
    found = score(PREDICTIONS)
    assert found["pass@1"] == pytest.approx({"outputs": 2 / 7, "task_mean": (1 / 3 + 1) / 4, "tasks": 1 / 4})
    assert found["pass@2"] == pytest.approx({"outputs": 5 / 7, "task_mean": (1 + 1 + 1 / 2) / 4, "tasks": 2 / 4})
    assert found["counts"] == {"outputs": 7, "tasks": 4, "pass@1_outputs": 2, "pass@2_outputs": 5}
    assert (found["checkpoint"], found["augmentations"]) == (40, 16)
    assert set(found) == {"pass@1", "pass@2", "counts", "intervals", "checkpoint", "augmentations"}


def test_a_grid_of_another_shape_is_wrong():
    flat = Prediction(colour(0), grid([1, 1]), grid([1], [1]), (Candidate(grid([1], [1]), 1, 0.0),))
    found = score(Predictions({"a": (flat,)}, 1, 0))
    assert found["pass@1"]["outputs"] == found["pass@2"]["outputs"] == 0


def test_unknown_outputs_are_not_scored():
    known = {"a": PREDICTIONS.tasks["a"]}
    mixed = {"a": (*known["a"], prediction(None, 1, 1)), "z": (prediction(None, 1, 1),)}
    assert score(Predictions(mixed, 16, 40)) == score(Predictions(known, 16, 40))


@pytest.mark.parametrize("tasks", [{}, {"z": (prediction(None, 1, 1),)}])
def test_nothing_to_score(tasks):
    found = score(Predictions(tasks, 1, 0))
    nothing = {"outputs": None, "task_mean": None, "tasks": None}
    assert found["pass@1"] == found["pass@2"] == found["intervals"]["pass@1"] == nothing
    assert found["counts"]["outputs"] == 0


def test_intervals_equal_a_naive_bootstrap_and_depend_on_the_seed_alone():
    found = score(PREDICTIONS, seed=3, resamples=50)
    assert found == score(PREDICTIONS, seed=3, resamples=50)
    assert found["intervals"] != score(PREDICTIONS, seed=4, resamples=50)["intervals"]
    draws = np.random.default_rng(3).integers(4, size=(50, 4))
    right, outputs = [3, 1, 1, 0], [3, 1, 2, 1]
    shares = [sum(right[t] for t in draw) / sum(outputs[t] for t in draw) for draw in draws]
    means = [sum(right[t] / outputs[t] for t in draw) / 4 for draw in draws]
    whole = [sum(right[t] == outputs[t] for t in draw) / 4 for draw in draws]
    for key, values in (("outputs", shares), ("task_mean", means), ("tasks", whole)):
        assert found["intervals"]["pass@2"][key] == pytest.approx([np.percentile(values, 2.5), np.percentile(values, 97.5)])


def test_interval_of_many_tasks_is_the_binomial_one():
    tasks = {str(i): (prediction(1, int(i % 4 == 0), 1),) for i in range(400)}
    low, high = score(Predictions(tasks, 1, 0))["intervals"]["pass@1"]["tasks"]
    assert low == pytest.approx(0.25 - 1.96 * (0.25 * 0.75 / 400) ** 0.5, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * (0.25 * 0.75 / 400) ** 0.5, abs=0.006)


def test_save_writes_three_files(tmp_path):
    (tmp_path / "score.json").write_text("old")
    found = save(tmp_path, PREDICTIONS, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.json", "score.json", "submission.json"]
    assert json.loads((tmp_path / "score.json").read_text()) == found == score(PREDICTIONS, seed=1)
    validate_submission(json.loads((tmp_path / "submission.json").read_text()), TASKS)
    stored = json.loads((tmp_path / "predictions.json").read_text())
    assert (stored["augmentations"], stored["checkpoint"], stored["too_long"]) == (16, 40, ["task d …"])
    assert stored["tasks"]["a"][1] == {
        "input": [[9]],
        "truth": [[2]],
        "greedy": [[3]],
        "candidates": [
            {"grid": [[3]], "votes": 3, "logprob": 0.0, "likelihood": None},
            {"grid": [[2]], "votes": 2, "logprob": -1.5, "likelihood": None},
        ],
    }
    assert stored["tasks"]["d"] == [{"input": [[9]], "truth": [[7]], "greedy": None, "candidates": []}]


def test_predictions_keep_five_candidates():
    many = Predictions({"a": (prediction(1, 1, 1, 2, 3, 4, 5, 6, 7),)}, 1, 0)
    assert [c["grid"] for c in json.loads(to_json(many))["tasks"]["a"][0]["candidates"]] == [[[c]] for c in (1, 2, 3, 4, 5)]


FAULTS = {
    "submission.json: must be an object": lambda s: [s],
    "task z is not one of": lambda s: s | {"z": []},
    "task b: missing": lambda s: {k: v for k, v in s.items() if k != "b"},
    "task b: must be a list": lambda s: s | {"b": s["b"][0]},
    "task a: 2 entries for 3 test inputs": lambda s: s | {"a": s["a"][:2]},
    "task b: 2 entries for 1 test inputs": lambda s: s | {"b": s["b"] * 2},
    "task b, entry 1: must be an object with exactly attempt_1 and attempt_2": lambda s: s | {"b": [[[1]]]},
}
ENTRIES = [{"attempt_1": [[1]]}, {"attempt_1": [[1]], "attempt_2": [[1]], "attempt_3": [[1]]}]
GRIDS = {
    "must be a grid": [None, [], 3, "11", [1, 2], [[1], None], [[1]] * 31, {"0": [1]}],
    "all rows must have the same length": [[[1], [1, 2]], [[]], [[], []], [[1] * 31]],
    "cells must be integers from 0 to 9": [[[10]], [[-1]], [[1.0]], [[True]], [[None]], [["1"]], [[[1]]], [[1, 2], [3, 10]]],
}


@pytest.mark.parametrize("message", FAULTS)
def test_validator_names_task_and_entry(message):
    with pytest.raises(DataError, match=re.escape(message)):
        validate_submission(FAULTS[message](build_submission(PREDICTIONS)), TASKS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_validator_names_missing_and_unknown_fields(entry):
    with pytest.raises(DataError, match=re.escape("mine.json: task a, entry 2: must be an object with exactly")):
        submission = build_submission(PREDICTIONS)
        submission["a"][1] = entry
        validate_submission(submission, TASKS, "mine.json")


@pytest.mark.parametrize(("message", "fault"), [(m, g) for m, grids in GRIDS.items() for g in grids])
@pytest.mark.parametrize("field", ["attempt_1", "attempt_2"])
def test_validator_names_the_field(message, fault, field):
    submission = copy.deepcopy(build_submission(PREDICTIONS))
    submission["c"][1][field] = fault
    with pytest.raises(DataError, match=f"^submission.json: task c, entry 2, {field}: {message}") as caught:
        validate_submission(submission, TASKS)
    assert "\n" not in str(caught.value)
