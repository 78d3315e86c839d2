"""What an evaluation leaves behind: predictions.json, submission.json (Kaggle's format, with its validator) and score.json.

Three aggregations of the same answers are reported, for they differ: the share of test outputs solved, the mean share per task,
the share of tasks with every output solved. pass@1 is the greedy answer without augmentation, pass@2 the best two of the vote, or
of its finalists. Letters: S resamples, Q scored tasks.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyonn_jax.arc.tasks import DataError, Task
from tinyonn_jax.arc.tokens import COLOURS, MAX_SIDE, Grid
from tinyonn_jax.arc.vote import Candidate
from tinyonn_jax.observe.files import PREDICTIONS, SCORE, SUBMISSION, write_atomically

ATTEMPTS = ("attempt_1", "attempt_2")
KEPT = 5
"""Candidates that predictions.json keeps."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """One test input, its true output if known, the greedy answer without augmentation (None: malformed), the vote's ranking."""

    input: Grid
    truth: Grid | None
    greedy: Grid | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of every test input of every task, in order; `too_long` has a line for each input that did not fit.

    `augmentations`: views that voted, at most; `checkpoint`: step of the evaluated parameters; `sequences`: prompts decoded.
    """

    tasks: dict[str, tuple[Prediction, ...]]
    augmentations: int
    checkpoint: int
    too_long: tuple[str, ...] = ()
    sequences: int = 0


def entries(predictions: Predictions) -> dict[str, list[dict[str, Any]]]:
    """By task, what predictions.json says of each test input; of the candidates, the best five."""

    def plain(grid: Grid | None) -> list | None:
        return None if grid is None else grid.tolist()

    return {
        name: [
            {
                "input": plain(p.input),
                "truth": plain(p.truth),
                "greedy": plain(p.greedy),
                "candidates": [
                    {"grid": plain(c.grid), "votes": c.votes, "logprob": c.logprob, "likelihood": c.likelihood}
                    for c in p.candidates[:KEPT]
                ],
            }
            for p in answers
        ]
        for name, answers in predictions.tasks.items()
    }


def to_json(predictions: Predictions) -> str:
    """The content of predictions.json."""
    rest = {"augmentations": predictions.augmentations, "checkpoint": predictions.checkpoint, "too_long": predictions.too_long}
    return json.dumps({"tasks": entries(predictions), **rest}, allow_nan=False) + "\n"


def build_submission(predictions: Predictions) -> dict[str, list[dict[str, list]]]:
    """Two attempts for every test input of every task, in order; where the vote has fewer, the input, never right, stands in."""

    def entry(prediction: Prediction) -> dict[str, list]:
        grids = [candidate.grid for candidate in prediction.candidates] + [prediction.input] * len(ATTEMPTS)
        return {attempt: grid.tolist() for attempt, grid in zip(ATTEMPTS, grids, strict=False)}

    return {name: [entry(p) for p in entries] for name, entries in predictions.tasks.items()}


def validate_submission(submission: Any, tasks: Iterable[Task], where: str = SUBMISSION) -> None:
    """Checks a submission as parsed from JSON against the tasks that it answers; `where` names the file in errors.

    Raises:
        DataError: the first fault, with its task, entry (counted from 1) and field.
    """
    if not isinstance(submission, dict):
        raise DataError(f"{where}: must be an object with one list per task id")
    tasks = list(tasks)
    for name in sorted(submission.keys() - {task.id for task in tasks}):
        raise DataError(f"{where}: task {name} is not one of the {len(tasks)} tasks; remove it")
    for task in tasks:
        place = f"{where}: task {task.id}"
        entries = submission.get(task.id)
        if entries is None:
            raise DataError(f"{place}: missing; every task needs a list with one entry per test input")
        if not isinstance(entries, list):
            raise DataError(f"{place}: must be a list with one entry per test input")
        if len(entries) != len(task.test):
            raise DataError(f"{place}: {len(entries)} entries for {len(task.test)} test inputs; give one each, in order")
        for i, entry in enumerate(entries, 1):
            if not isinstance(entry, dict) or entry.keys() != set(ATTEMPTS):
                raise DataError(f"{place}, entry {i}: must be an object with exactly {' and '.join(ATTEMPTS)}")
            for field in ATTEMPTS:
                fault = _fault(entry[field])
                if fault:
                    raise DataError(f"{place}, entry {i}, {field}: {fault}")


def score(predictions: Predictions, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """The content of score.json: shares in [0, 1], counts, and 95 % intervals from resampling tasks with replacement.

    Test inputs whose true output is unknown are left out; with none left, every share is None. One `seed`, one interval.
    """
    scored = [known for entries in predictions.tasks.values() if (known := [p for p in entries if p.truth is not None])]
    outputs = np.array([len(entries) for entries in scored])  # [Q]
    drawn = np.random.default_rng(seed).integers(max(len(scored), 1), size=(resamples, len(scored)))  # [S,Q]
    result: dict[str, Any] = {"counts": {"outputs": int(outputs.sum()), "tasks": len(scored)}, "intervals": {}}
    answers: dict[str, Callable[[Prediction], list[Grid | None]]] = {
        "pass@1": lambda p: [p.greedy],
        "pass@2": lambda p: [candidate.grid for candidate in p.candidates[: len(ATTEMPTS)]],
    }
    for name, grids in answers.items():
        right = np.array([sum(_solved(p, grids(p)) for p in entries) for entries in scored], int)
        result[name] = {key: float(share) if scored else None for key, share in _shares(right, outputs).items()}
        result["intervals"][name] = {
            key: np.quantile(shares, [0.025, 0.975]).tolist() if scored else None
            for key, shares in _shares(right[drawn], outputs[drawn]).items()
        }
        result["counts"][f"{name}_outputs"] = int(right.sum())
    return result | {"checkpoint": predictions.checkpoint, "augmentations": predictions.augmentations}


def save(folder: str | os.PathLike[str], predictions: Predictions, seed: int = 0, **facts: Any) -> dict[str, Any]:
    """Writes predictions.json, submission.json and score.json, each in one move; returns the score, `facts` about it included."""
    result = score(predictions, seed) | facts
    for name, text in (
        (PREDICTIONS, to_json(predictions)),
        (SUBMISSION, json.dumps(build_submission(predictions)) + "\n"),
        (SCORE, json.dumps(result, indent=2, allow_nan=False) + "\n"),
    ):
        write_atomically(Path(folder) / name, text)
    return result


def _solved(prediction: Prediction, grids: Iterable[Grid | None]) -> bool:
    """Whether one of the grids is the true output."""
    truth = prediction.truth
    return truth is not None and any(grid is not None and np.array_equal(grid, truth) for grid in grids)


def _shares(right: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """The three aggregations over the last axis (tasks) of the outputs solved and the outputs there are; NaN for no tasks."""
    tasks = max(right.shape[-1], 1)
    return {
        "outputs": right.sum(-1) / np.maximum(outputs.sum(-1), 1),
        "task_mean": (right / outputs).sum(-1) / tasks,
        "tasks": (right == outputs).sum(-1) / tasks,
    }


def _fault(grid: Any) -> str | None:
    """What is wrong with an attempt, if anything."""
    if not isinstance(grid, list) or not 1 <= len(grid) <= MAX_SIDE or not all(isinstance(row, list) for row in grid):
        return f"must be a grid, a list of 1 to {MAX_SIDE} rows of cells"
    if len({len(row) for row in grid}) > 1 or not 1 <= len(grid[0]) <= MAX_SIDE:
        return f"all rows must have the same length, 1 to {MAX_SIDE}"
    if any(type(cell) is not int or not 0 <= cell < COLOURS for row in grid for cell in row):
        return f"cells must be integers from 0 to {COLOURS - 1}"
    return None
