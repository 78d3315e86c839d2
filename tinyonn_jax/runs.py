"""A run folder: begun, opened, trained. What comes after (`trained.py`, the report) needs the folder and nothing else.

Before the first step `run.json` (preset, command, versions), `tasks.json` and `config.json` are written, in this order, so that
a folder that has the last has all.
"""

import contextlib
import importlib.metadata
import io
import json
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tinyonn_jax import __version__
from tinyonn_jax.arc.batches import Batch, batch_at, build_dataset, validation_batches
from tinyonn_jax.arc.continual import build_stages
from tinyonn_jax.arc.sets import TaskSets, load_task_sets
from tinyonn_jax.arc.sets import from_json as tasks_from_json
from tinyonn_jax.arc.sets import to_json as tasks_to_json
from tinyonn_jax.arc.tasks import DataError
from tinyonn_jax.config import Config, ConfigError
from tinyonn_jax.layers import grouped
from tinyonn_jax.models.flops import useful_flops
from tinyonn_jax.observe.console import Progress
from tinyonn_jax.observe.files import (
    ANSWERS,
    CONFIG,
    ORIGIN,
    PARAMETERS,
    ROUTING,
    TASKS,
    require_run,
    stored_origin,
    write_atomically,
)
from tinyonn_jax.observe.metrics import training_seconds
from tinyonn_jax.observe.writers import MetricsWriter, read_metrics
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.stored import differences, from_json, plain, to_json
from tinyonn_jax.training import assemble, loop, processes, sharding
from tinyonn_jax.training.checkpoint import Checkpoints
from tinyonn_jax.training.objective import make_rule
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import Step
from tinyonn_jax.uses import idle

CHECKPOINTS, LOCK = "checkpoints", ".lock"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A folder, how it is configured, and the tasks that it learns from and is scored on."""

    folder: Path
    config: Config
    sets: TaskSets


def stored_config(folder: Path) -> Config | None:
    """The configuration of a run folder; None where no run has begun.

    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        return None
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; restore it, or start the run again in a new folder") from None


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: there is none, or its files cannot be read.
        DataError: its tasks are damaged.
    """
    folder, config = Path(folder), stored_config(folder)
    if config is None:
        require_run(folder)
        raise ConfigError(f"{folder / CONFIG}: is missing; restore it, or start the run again in a new folder")
    path = folder / TASKS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it, or start the run again in a new folder") from None
    return Run(folder, config, tasks_from_json(text, config.data, str(path)))


def begin(folder: Path, config: Config, preset: str, command: str = "") -> Run:
    """The run in a folder, begun there if it is not yet.

    A later start may have another `config.mesh` and `config.eval`, which are then kept; anything else may change only until the
    first checkpoint. `preset` and `command` are noted, for the record.

    Raises:
        ConfigError: a run with another configuration is there, another process trains it, or its files cannot be read; options do
            nothing, or the devices do not fit the mesh.
        DataError: the tasks cannot be used.
    """
    folder, before = Path(folder), stored_config(folder)
    sharding.make_mesh(config.mesh)  # raises before anything is written
    if not _may_change(folder, config, preset) and before is not None:
        with _alone(folder):
            if before != config and jax.process_index() == 0:
                write_atomically(folder / CONFIG, to_json(config))
        return replace(open_run(folder), config=config)
    make_rule(config)  # raises, too
    sets = load_task_sets(config.data)
    with _alone(folder):
        origin = {"preset": preset, "command": command, "tinyonn_jax": __version__, "python": platform.python_version()}
        origin |= {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
        if jax.process_index() == 0:
            _may_change(folder, config, preset)  # still: another process may have trained meanwhile
            (folder / CONFIG).unlink(missing_ok=True)  # a folder that has one has the tasks that belong to it
            write_atomically(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
            write_atomically(folder / TASKS, tasks_to_json(sets))
            write_atomically(folder / CONFIG, to_json(config))
    return Run(folder, config, sets)


def _may_change(folder: Path, config: Config, preset: str) -> bool:
    """Whether the run in a folder has another configuration, and no checkpoint yet.

    Raises:
        ConfigError: it has both.
    """
    before = stored_config(folder)
    changed = [] if before is None else differences(plain(before), plain(config))
    if changed and any((folder / CHECKPOINTS).glob("*")):
        began = f"preset {stored_origin(folder)}, not {preset}; " if stored_origin(folder) not in (preset, None) else ""
        first = stored_origin(folder, "command")
        raise ConfigError(
            f"{folder / CONFIG} differs from this command: {began}{'; '.join(changed)}; what a run began with stays: leave these "
            f"out to go on with it{f' (it began as: {first})' if first else ''}, or begin another one with --workdir"
        )
    return bool(changed)


def train(run: Run, started: float | None = None, profile: int = 0) -> None:
    """Trains to the last step of the configuration, going on from the newest checkpoint; says what it does on the way.

    `profile` steps after the first ten are traced.

    Raises:
        InterruptedRun, DivergedError, CheckpointError: see `loop.run`.
        ConfigError: the devices do not fit the mesh, or another run trains into the folder.
        DataError: no sequence fits.
    """
    with _alone(run.folder):
        try:
            _train(run, started, profile)
        except (ConfigError, DataError):
            if jax.process_index() == 0 and not any((run.folder / CHECKPOINTS).glob("*")):
                (run.folder / CONFIG).unlink(missing_ok=True)  # it never began, and what was named for it does not stay
            raise


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps others from training into a folder; the system lets go of it, however this process, the first of its run, ends."""
    with contextlib.ExitStack() as held:
        with processes.by_first(ConfigError) as first:
            if first:
                held.enter_context(_locked(folder))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """With the lock of a folder, which is made where it is missing.

    Raises:
        ConfigError: another process has it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{folder}: is a file, or lies in one; name a folder with --workdir") from None
    with open(folder / LOCK, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process trains into it; wait for it or stop it, or change --workdir") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        yield


def _train(run: Run, started: float | None, profile: int) -> None:
    folder, config, sets = run.folder, run.config, run.sets
    if jax.process_count() > 1:
        processes.share(folder)
        agree(run)
    mesh = sharding.make_mesh(config.mesh)
    process, feeding = jax.process_index(), sharding.feeding(mesh)
    course = _course(run, feeding, mesh)
    batches = partial(course.batch_at, config.train.seed, process=feeding, multiple=sharding.row_shards(mesh))
    program = assemble.assemble(config, mesh, len(sets.tasks), course.batch_at(config.train.seed, 0))
    parameters = assemble.count_parameters(program.spec)
    if process == 0:
        write_atomically(folder / PARAMETERS, json.dumps(parameters, indent=2) + "\n")

    steps = config.train.steps
    say = Progress(steps, process=process).line
    for line in (sets.audit, *_skipped(sets), *sets.messages, *course.messages, *_idle(run)):
        say(line)
    total, embeddings, routers = (parameters[name] for name in ("total", "embeddings", "routers"))
    say(f"parameters: {total:,}, of which {embeddings:,} in embeddings and {routers:,} in routers")
    say(sharding.describe(mesh))
    if config.model.kind == "dyntrm":
        platform = mesh.devices.flat[0].platform
        say(f"grouped matmul: {grouped.title(config.mesh.grouped, platform)} ({platform})")

    processes.meet("start")  # the first collective follows, and gives up on those who are late (Gloo: after half a minute)
    with Checkpoints(folder / CHECKPOINTS, config.train.keep, plain(config), say) as checkpoints:
        state = checkpoints.restore(program.like)
        if state is None:
            state = program.initial()
            for name in (*ANSWERS, ROUTING) if process == 0 else ():  # of a run that was here before
                (folder / name).unlink(missing_ok=True)
        done = int(state.step)
        if done >= steps:
            say(f"{folder} is complete: {done} of {steps} steps; {_next(folder)}")
            return
        if done:
            say(f"going on from step {done} of {steps}")
        say("the first step of each length is compiled: half a minute each, or seconds from the cache")

        def snapshot(_: int, state: Any, metrics: dict[str, Any]) -> None:
            arrays = assemble.routing_snapshot(state, metrics)
            if arrays and process == 0:
                buffer = io.BytesIO()
                np.savez(buffer, allow_pickle=False, **arrays)
                write_atomically(folder / ROUTING, buffer.getvalue())

        measure = assemble.make_validation(program)
        validate = None if course.test is None else partial(course.test, measure)
        schedule = replace(config.train, validate_every=steps // config.data.sequence) if config.data.sequence else config.train
        with (
            _traced(program.step, profile, folder / "profile", say) as step,
            _writer(folder, done, process) as writer,
            Progress(steps, done, process) as display,
        ):
            earlier = training_seconds(read_metrics(folder)) if process == 0 else 0.0
            if config.data.sequence and not done and validate is not None:
                writer.write(0, validate(state))  # what forward transfer is measured against
            loop.run(
                step,
                state,
                batches,
                schedule,
                checkpoints,
                writer,
                display,
                max_skipped=config.optim.max_skipped,
                put=program.put,
                tokens=lambda batch: int(batch.length.sum()) * feeding[1],
                flops=lambda batch: useful_flops(config.model, batch.length, batch.prefix) * feeding[1],
                validate=validate,
                on_checkpoint=snapshot,
                started=(time.time() if started is None else started) - earlier,
            )
    say(f"{steps} of {steps} steps done; {_next(folder)}")


@contextlib.contextmanager
def _traced(step: Step, count: int, folder: Path, say: Callable[[str], None], after: int = 10) -> Iterator[Step]:
    """The step, of which so many calls are traced once others have compiled, or as many as there are before the run ends."""
    calls = 0

    def stop(traced: int) -> None:
        jax.profiler.stop_trace()
        say(f"traced {traced} steps into {folder}: for TensorBoard's profiler, or trace.json.gz for ui.perfetto.dev")

    def traced(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            jax.profiler.start_trace(folder)
        out = step(state, batch)
        if calls == after + count:
            jax.block_until_ready(out)
            stop(count)
        return out

    try:
        yield traced if count else step
    finally:
        if after < calls < after + count:
            stop(calls - after)
        elif count and calls <= after:
            say(f"nothing traced: the first {after} steps are left out, and this run took {calls}")


class _Course(NamedTuple):
    """What a run learns from, as `batches.batch_at` without its dataset, what did not fit, and how a state is tested with the
    measure that it is given."""

    batch_at: Callable[..., Batch]
    messages: tuple[str, ...]
    test: Callable[[assemble.Validation, TrainState], dict[str, Any]] | None


def _course(run: Run, process: tuple[int, int], mesh: Mesh) -> _Course:
    """All tasks mixed, tested on held-out demonstrations if there are any; or stages one after another, all tested each time."""
    config, sets = run.config, run.sets
    if not config.data.sequence:
        dataset = build_dataset(sets, config.data)
        held_out = partial(validation_batches, dataset, process=process, multiple=sharding.row_shards(mesh))
        test = (lambda measure, state: measure(state, held_out())) if sets.validation else None
        return _Course(partial(batch_at, dataset), dataset.messages, test)
    stages = build_stages(sets, config.data, config.train.steps, config.train.seed, sharding.row_shards(mesh))

    def mine(rows: np.ndarray) -> np.ndarray:
        return np.split(rows, process[1])[process[0]]

    def test_all(measure: assemble.Validation, state: TrainState) -> dict[str, Any]:
        found = [measure(state, (jax.tree.map(mine, batch) for batch in test)) for test in stages.tests]
        return {f"stage_{what}": [each[f"valid_{what}"] for each in found] for what in ("acc", "exact")}

    return _Course(stages.batch_at, tuple(m for dataset in stages.datasets for m in dataset.messages), test_all)


def _next(folder: Path) -> str:
    return f"evaluate with: python experiments/arc.py evaluate --workdir {shlex.quote(str(folder))}"


def _writer(folder: Path, done: int, process: int) -> Any:
    return MetricsWriter(folder, done) if process == 0 else _Silent()


class _Silent:
    """Stands for the writer in the processes that write nothing."""

    def write(self, step: int, metrics: Any) -> None:
        pass

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _skipped(sets: TaskSets) -> list[str]:
    return [f"{sets.skipped} invalid tasks skipped"] if sets.skipped else []


def agree(run: Run, **facts: str) -> None:
    """Checks that all processes have the same run before them, and the same of whatever else is named.

    Raises:
        ConfigError: they have not: they would train apart, or answer with several networks.
    """
    processes.agree(options=to_json(run.config), tasks=tasks_to_json(run.sets), code=__version__, **facts)


def _idle(run: Run) -> list[str]:
    """What the run has otherwise than its preset, to no effect."""
    _, base = PRESETS.get(stored_origin(run.folder) or "", ("", Config()))
    return idle(run.config, base)
