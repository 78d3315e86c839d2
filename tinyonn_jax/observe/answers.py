"""Answers to a task as a person judges them: which are right, why not, and ARC's colours.

`entries` is always one task's list in `predictions.json`: for each test input its grid, the truth or null, the greedy answer and
the voted candidates, best first. Letters: H rows of a grid, W columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Grid = Sequence[Sequence[int]]
Entry = Mapping[str, Any]

ARC_COLOURS = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00", "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
MARK = {True: "✓ ", False: "✗ ", None: ""}


def answers(entry: Entry) -> list[tuple[str, Grid | None]]:
    """Names and grids of one test input's answers in `predictions.json`: greedy, then the two that are submitted, with what they
    were chosen by: votes, and log-probability in nats where finalists were ranked."""
    candidates = entry.get("candidates") or []
    if not candidates:
        return [("greedy", entry.get("greedy")), ("attempt 1", None)]

    def name(i: int, candidate: Mapping[str, Any]) -> str:
        votes, likelihood = candidate["votes"], candidate.get("likelihood")
        said = f"attempt {i} · {votes} vote{'s' * (votes != 1)}"
        return said if likelihood is None else f"{said} · {likelihood:.3g}"

    return [("greedy", entry.get("greedy")), *((name(i, c), c["grid"]) for i, c in enumerate(candidates[:2], 1))]


def questions(entries: Sequence[Entry]) -> list[str]:
    """What to call a task's test inputs."""
    return ["test input"] if len(entries) == 1 else [f"test input {i}" for i, _ in enumerate(entries, 1)]


def judge(grid: Grid | None, truth: Grid | None) -> tuple[bool | None, str]:
    """Whether an answer is right (None: no truth to compare with), and why in a few words."""
    if grid is None:
        return (False if truth is not None else None), "no answer"
    if truth is None:
        return None, ""
    if [list(row) for row in grid] == [list(row) for row in truth]:
        return True, "right"
    (h, w), (th, tw) = (len(grid), len(grid[0])), (len(truth), len(truth[0]))
    if (h, w) != (th, tw):
        return False, f"{w} × {h}, not {tw} × {th}"
    off = int(np.sum(np.asarray(grid) != np.asarray(truth)))
    return False, f"{off} of {w * h} cells off"


def solved(entries: Sequence[Entry]) -> bool | None:
    """Whether one of the two submitted answers is right for every test input of a task; None without truth."""
    verdicts = [[judge(grid, entry.get("truth"))[0] for _, grid in answers(entry)[1:]] for entry in entries]
    if any(entry.get("truth") is None for entry in entries):
        return None
    return all(any(attempts) for attempts in verdicts)
