"""What a run learns from and what it is scored on: sets of tasks kept apart, audited, and written beside a run.

`load_task_sets` reads the sources that a configuration names, leaves out what may not be trained on, and audits the result.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tinyonn_jax.arc.augment import DIHEDRALS, free_colours, transform
from tinyonn_jax.arc.tasks import DataError, Pair, Task, canonical_name, load_source, parse_pairs, show
from tinyonn_jax.arc.tokens import COLOURS, Grid, pair_length
from tinyonn_jax.config import DataConfig


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
    seen = {canonical_name(cfg.eval, "eval")}
    for name in cfg.train:
        if canonical_name(name, "train") in seen:
            continue
        seen.add(canonical_name(name, "train"))
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
    return TaskSets(built, held, tuple(evaluation), audit(built, evaluation, cfg), skipped, tuple(messages))


def audit(tasks: Iterable[Task], evaluation: Iterable[Task], cfg: DataConfig) -> str:
    """Checks that no test output of an evaluated task is trained on; returns the finding as one line for a human.

    By id: a training pair of an evaluated task must be one of its demonstrations. By identical pair: no training pair of any
    task may equal a scored test pair. That augmentation, as `cfg` has it, makes some test pairs of training pairs is ARC's own
    doing, most often of a task's demonstrations: it is allowed, and counted.

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
    made = _made(tasks, [pair for task in evaluation for pair in task.test], cfg.permute_zero) if cfg.augment else 0
    return f"leakage audit: {finding}" + (f"; test pairs that augmentation makes of training pairs: {made:,}" if made else "")


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


def from_json(text: str, cfg: DataConfig, where: str = "tasks.json") -> TaskSets:
    """The sets that `to_json` wrote, audited again; `where` names the file in errors.

    Raises:
        DataError: the text is damaged.
    """
    try:
        data = json.loads(text)
        tasks, evaluation = (
            tuple(
                Task(_id(raw["id"]), parse_pairs(raw["train"], where, "train"), parse_pairs(raw["test"], where, "test"))
                for raw in data[key]
            )
            for key in ("tasks", "evaluation")
        )
        held = parse_pairs([entry["pair"] for entry in data["validation"]], f"{where}: validation", "train")
        rows = [entry["row"] for entry in data["validation"]]
        validation = tuple(Example(row, tasks[row].id, pair) for row, pair in zip(rows, held, strict=True))
        return TaskSets(tasks, validation, evaluation, audit(tasks, evaluation, cfg), data["skipped"], tuple(data["messages"]))
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise DataError(f"{where}: damaged ({show(error)}); restore it, or start the run again in a new folder") from None


def _id(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a task's id must be text, not {value!r}")
    return value


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


def _made(trained: Iterable[Task], scored: Iterable[Pair], permute_zero: bool) -> int:
    """How many of the scored pairs are trained ones, turned, with the free colours of their task permuted."""
    known = [(_outline(pair), pair) for pair in scored if pair.output is not None]
    outlines = {outline for outline, _ in known}
    alike: dict[tuple, list[tuple[tuple, Pair]]] = {}  # by the colours that stay as they are
    for task in trained:
        fixed = tuple(np.flatnonzero(~free_colours(task.train, permute_zero)))
        pairs = [(_outline(pair), pair) for pair in task.train + task.test]
        alike.setdefault(fixed, []).extend(pair for pair in pairs if pair[0] in outlines)
    made = set()
    for fixed, pairs in alike.items():
        shared, forms = {outline for outline, _ in pairs}, {_form(pair, fixed) for _, pair in pairs}
        made |= {i for i, (outline, pair) in enumerate(known) if outline in shared and _form(pair, fixed) in forms}
    return len(made)


def _outline(pair: Pair) -> tuple:
    """What all views of a pair share, quick to see."""
    grids = [grid for grid in (pair.input, pair.output) if grid is not None]
    counts = np.sum([np.bincount(grid.ravel(), minlength=COLOURS) for grid in grids], 0)
    return *(tuple(sorted(grid.shape)) for grid in grids), *sorted(counts)


def _form(pair: Pair, fixed: tuple) -> tuple:
    """Equal for two pairs just if one is a view of the other in which the `fixed` colours stay: the least of its turns, the other
    colours numbered as they appear."""
    forms = []
    for dihedral in range(DIHEDRALS):
        grids = [transform(dihedral, grid) for grid in (pair.input, pair.output) if grid is not None]
        cells = np.concatenate([fixed, *(grid.ravel() for grid in grids)])  # those come first, and so keep their places
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
