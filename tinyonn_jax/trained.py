"""A trained run: loaded from its folder, scored on the tasks that it is evaluated on, asked about others."""

import difflib
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from tinyonn_jax.arc import submission
from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.arc.evaluate import evaluate as answer
from tinyonn_jax.arc.forced import exact_per_recursion, ranked
from tinyonn_jax.arc.generate import Decoder
from tinyonn_jax.arc.tasks import Task, parse_task, read_json, read_source
from tinyonn_jax.config import ConfigError, EvalConfig, MeshConfig
from tinyonn_jax.layers import base
from tinyonn_jax.models import transformer
from tinyonn_jax.observe.console import Progress
from tinyonn_jax.observe.metrics import duration
from tinyonn_jax.runs import CHECKPOINTS, Run, Say, agree
from tinyonn_jax.stored import plain
from tinyonn_jax.training import assemble, processes, sharding
from tinyonn_jax.training.checkpoint import restore_params
from tinyonn_jax.uses import idle

Which = int | Literal["latest", "best"]


@dataclass(frozen=True)
class Trained:
    """A run's parameters (their moving average at `step`) on a mesh, ready to answer."""

    run: Run
    mesh: Mesh
    params: Any
    step: int

    @cached_property  # a new one would compile anew
    def _decoder(self) -> Decoder:
        return assemble.make_decoder(self.run.config, self.mesh)

    @cached_property
    def _scorer(self) -> Callable[[Batch], Any]:
        return partial(assemble.make_scorer(self.run.config, self.mesh), self.params)

    def answer(self, tasks: tuple[Task, ...], say: Say | None = None) -> submission.Predictions:
        """Answers every test input of `tasks` as `run.config.eval` says, many processes together; `say` reports progress."""
        return answer(
            self._decoder,
            self.params,
            tasks,
            checkpoint=self.step,
            **self._work("decoded", say),
        )

    def ranked(
        self, predictions: submission.Predictions, tasks: tuple[Task, ...], say: Say | None = None
    ) -> submission.Predictions:
        """What `answer` found, with the finalists of each vote, if `run.config.eval` wants any, ranked by their likelihood."""
        count = self.run.config.eval.finalists
        if not count:
            return predictions
        if say:  # it takes a while until the first is scored
            say(f"ranking the {count} candidates with most votes by their likelihood in every view")
        multiple = sharding.row_shards(self.mesh)
        return ranked(predictions, self._scorer, tasks, multiple=multiple, **self._work("scored", say))

    def _work(self, done: str, say: Say | None) -> dict[str, Any]:
        """What answering and ranking need to know alike; `done` says what happens to sequences."""
        config, count = self.run.config, jax.process_count()
        return {
            "task_ids": self.run.sets.task_ids,
            "data": config.data,
            "cfg": config.eval,
            "seed": config.train.seed,
            "progress": None if say is None else _pace(done, say),
            "process": (jax.process_index(), count),
            "gather": partial(processes.gather, place="answers") if count > 1 else None,
        }

    def per_recursion(self, tasks: tuple[Task, ...]) -> list[float] | None:
        """The share of test outputs that greedy decoding has right after each recursion; None if no output is known."""
        config = self.run.config
        exact_fn, multiple = partial(assemble.make_exact(config, self.mesh), self.params), sharding.row_shards(self.mesh)
        shares = exact_per_recursion(exact_fn, tasks, self.run.sets.task_ids, config.data, config.eval, multiple)
        return None if np.isnan(shares[0]) else shares


def _pace(what: str, say: Say) -> Callable[[int, int], None]:
    """Reports how many of all sequences are done: the first, then every five seconds and in the end, with the pace since the
    first, which waited for a compilation."""
    first, last = (0, 0.0), -math.inf

    def progress(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if done == first[0] or (done < total and now - last <= 5):
            return
        last = now
        if not first[0]:
            first = done, now
            return say(f"{what} {done:,} of {total:,} sequences")
        rate = (done - first[0]) / max(now - first[1], 1e-9)
        pace = f"{rate:,.0f} a second" if rate >= 10 else f"{60 * rate:,.0f} a minute"
        say(f"{what} {done:,} of {total:,} sequences, {pace}, {duration((total - done) / rate)} left")

    return progress


def load(run: Run, checkpoint: Which, say: Say) -> Trained:
    """The parameters of a run, from one of its checkpoints, on the devices of this process: of many, each has them all.

    A network that learned without augmentation answers the one view that it knows, whatever `run.config.eval` says.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the devices do not fit the mesh.
    """
    mesh = sharding.make_mesh(run.config.mesh, local=True)
    say(sharding.describe(mesh))
    spec = transformer.spec(run.config.model, len(run.sets.tasks))
    like = sharding.abstract(mesh, spec, lambda: base.init(jax.random.key(0), spec))
    params, step = restore_params(run.folder / CHECKPOINTS, like, "ema", checkpoint, say, plain(run.config))
    for line in idle(run.config, replace(run.config, eval=EvalConfig(), mesh=MeshConfig())):
        say(line)
    views = run.config.eval.augmentations
    if not run.config.data.augment and views > 1:
        say(f"one view instead of {views}: the network was trained with data.augment false and knows no other")
        run = replace(run, config=replace(run.config, eval=replace(run.config.eval, augmentations=1)))
    return Trained(run, mesh, jax.jit(transformer.refined)(params), step)  # not again for every token


def evaluate(run: Run, checkpoint: Which) -> dict[str, Any] | None:
    """Answers every evaluated test input, writes predictions.json, submission.json and score.json, and returns the score.

    They are written as soon as there are answers, when finalists are ranked, and when recursions are measured. Of many
    processes each answers its share, on a mesh of its own devices; the first alone writes and says what it does, and the others
    return None. The score's `speed` counts the sequences of all and the seconds from the first prompt to the last answer,
    compilation included.

    Raises:
        CheckpointError: see `load`.
        ConfigError: see there; or the processes differ in what they are to do.
    """
    process, count = jax.process_index(), jax.process_count()
    with processes.by_first(ConfigError) as first:
        if first and not os.access(run.folder, os.W_OK):  # better now than when all is decoded
            raise ConfigError(f"{run.folder}: cannot be written to, and score.json belongs there; check its permissions")
    say = Progress(0, process=process).line
    trained = load(run, checkpoint, say)
    run = trained.run
    if count > 1:
        agree(run, checkpoints=str(trained.step))
        say(f"{count} processes share the sequences; progress is that of the first")
    started = time.monotonic()
    predictions = trained.answer(run.sets.evaluation, say)
    seconds = time.monotonic() - started
    sequences = predictions.sequences
    speed = {"sequences": sequences, "seconds": seconds, "sequences_per_second": sequences / seconds}

    def save(**facts: Any) -> dict[str, Any] | None:
        if process:
            return None
        submission.validate_submission(submission.build_submission(predictions), run.sets.evaluation)
        return submission.save(run.folder, predictions, run.config.train.seed, speed=speed, **facts)

    save(eval=asdict(replace(run.config.eval, finalists=0)))  # what comes next may fail, or be stopped
    predictions = trained.ranked(predictions, run.sets.evaluation, say)
    for line in predictions.too_long:
        say(line)
    score = save(eval=asdict(run.config.eval))
    if run.config.model.recursed and not process:
        score = save(eval=asdict(run.config.eval), greedy_per_recursion=trained.per_recursion(run.sets.evaluation))
    processes.meet("score")
    return score


def find_task(run: Run, name: str) -> Task:
    """The task of a run with that id: an evaluated one, or one that was only trained on.

    Raises:
        ConfigError: there is none.
    """
    return _named(name, [task for task in (*run.sets.tasks, *run.sets.evaluation) if task.test], run.folder)


def _named(name: str, tasks: Iterable[Task], where: Path) -> Task:
    by_id = {task.id: task for task in tasks}
    if name in by_id:
        return by_id[name]
    near = difflib.get_close_matches(name, by_id, 3) or sorted(by_id)[:3]
    like = f", like {', '.join(near)}" if near else ""
    if not name:
        raise ConfigError(f"{where} has {len(by_id)} task{'s' * (len(by_id) != 1)}{like}: name one with --task")
    raise ConfigError(f"task {name} is not in {where}, which has {len(by_id)}{like}")


def read_task(run: Run, file: Path, name: str = "") -> Task:
    """A task of the user's own, for a run that can answer tasks that it was not trained on: the only one in a file, or the one of
    that id in a Kaggle file.

    Raises:
        ConfigError: the run cannot, or there is no such task.
        DataError: the file is no valid task.
    """
    if run.config.data.format != "context":
        raise ConfigError(
            f"{run.folder} was trained with data.format pair and knows only its own tasks; for unseen ones train with "
            "--data.format context --model.no-task-embedding"
        )
    raw = read_json(file)
    if isinstance(raw, dict) and raw and "train" not in raw and "test" not in raw:
        source = read_source(str(file), "eval")
        if not source.tasks:
            name = name or next(iter(source.faults))
        if name in source.faults:  # those of others do not matter
            raise ConfigError(source.faults[name])
        if not name and len(source.tasks) == 1 and not source.faults:
            return source.tasks[0]
        return _named(name, source.tasks, file)
    if name not in ("", file.stem):
        raise ConfigError(f"{file} holds one task, {file.stem}: leave out --task {name}")
    return parse_task(file.stem, raw, str(file))
