"""A run folder: begun, trained, evaluated, asked for predictions. What comes after training needs the folder and nothing else.

Before the first step `run.json` (preset, command, versions), `tasks.json` and `config.json` are written, in this order, so that
a folder that has the last has all.
"""

import contextlib
import difflib
import importlib.metadata
import io
import json
import platform
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tinyonn_jax import __version__
from tinyonn_jax.arc import submission
from tinyonn_jax.arc.batches import Batch, batch_at, build_dataset, validation_batches
from tinyonn_jax.arc.continual import build_stages
from tinyonn_jax.arc.evaluate import evaluate as answer
from tinyonn_jax.arc.forced import exact_per_recursion, ranked
from tinyonn_jax.arc.tasks import Task, TaskSets, load_task_sets, parse_task, read_json
from tinyonn_jax.arc.tasks import from_json as tasks_from_json
from tinyonn_jax.arc.tasks import to_json as tasks_to_json
from tinyonn_jax.config import Config, ConfigError
from tinyonn_jax.layers import base, grouped
from tinyonn_jax.models import transformer
from tinyonn_jax.models.flops import useful_flops
from tinyonn_jax.observe.console import Progress
from tinyonn_jax.observe.files import stored_preset, write_atomically
from tinyonn_jax.observe.metrics import duration
from tinyonn_jax.observe.writers import MetricsWriter
from tinyonn_jax.stored import differences, from_json, to_json
from tinyonn_jax.training import assemble, loop, sharding
from tinyonn_jax.training.checkpoint import Checkpoints, meet, restore_params
from tinyonn_jax.training.objective import make_rule
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import Step

CONFIG, TASKS, ORIGIN, PARAMETERS = "config.json", "tasks.json", "run.json", "parameters.json"
ROUTING, CHECKPOINTS, LOCK = "routing_latest.npz", "checkpoints", ".lock"
Say = Callable[[str], None]
Which = int | Literal["latest", "best"]


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
        ConfigError: there is none.
        DataError: its tasks are damaged.
    """
    folder, config = Path(folder), stored_config(folder)
    if config is None:
        what = f"holds no {CONFIG}" if folder.is_dir() else "no such run folder"
        raise ConfigError(
            f"{folder}: {what}; train writes it: python experiments/arc.py train --workdir {shlex.quote(str(folder))}"
        )
    path = folder / TASKS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it, or start the run again in a new folder") from None
    return Run(folder, config, tasks_from_json(text, str(path)))


def begin(folder: Path, config: Config, preset: str, command: str = "") -> Run:
    """The run in a folder, begun there if it is not yet; `config.mesh` and `config.eval` may change from one start to the next,
    and everything as long as nothing has been saved.

    `preset` and `command` are noted, for the record.

    Raises:
        ConfigError: a run with another configuration is there, or options are set that do nothing.
        DataError: the tasks cannot be used.
    """
    folder, before = Path(folder), stored_config(folder)
    changed = [] if before is None else differences(before, config)
    if before is not None and not changed:
        return replace(open_run(folder), config=config)
    if changed and any((folder / CHECKPOINTS).glob("*")):
        began = f"preset {stored_preset(folder)}, not {preset}; " if stored_preset(folder) not in (preset, None) else ""
        raise ConfigError(
            f"{folder / CONFIG} differs from this command: {began}{'; '.join(changed)}; what a run began with stays: leave these "
            "out to go on with it, or begin another one with --workdir"
        )
    make_rule(config)  # raises before anything is written
    sets = load_task_sets(config.data)
    with _alone(folder):
        origin = {"preset": preset, "command": command, "tinyonn_jax": __version__, "python": platform.python_version()}
        origin |= {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
        if jax.process_index() == 0:
            write_atomically(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
            write_atomically(folder / TASKS, tasks_to_json(sets))
            write_atomically(folder / CONFIG, to_json(config))
    return Run(folder, config, sets)


def train(run: Run, started: float | None = None, profile: int = 0) -> None:
    """Trains to the last step of the configuration, going on from the newest checkpoint; says what it does on the way.

    `profile` steps after the first ten are traced.

    Raises:
        InterruptedRun, DivergedError, CheckpointError: see `loop.run`.
        ConfigError: the devices do not fit the mesh, or another run trains into the folder.
        DataError: no sequence fits.
    """
    with _alone(run.folder):
        _train(run, started, profile)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps others from training into a folder; the system lets go of it, however this process, the first of its run, ends."""
    if jax.process_index() > 0:
        yield
        return
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
    for line in (sets.audit, *_skipped(sets), *sets.messages, *course.messages):
        say(line)
    total, embeddings, routers = (parameters[name] for name in ("total", "embeddings", "routers"))
    say(f"parameters: {total:,}, of which {embeddings:,} in embeddings and {routers:,} in routers")
    say(_devices(mesh))
    if config.model.kind == "dyntrm":
        platform = mesh.devices.flat[0].platform
        say(f"grouped matmul: {grouped.title(config.mesh.grouped, platform)} ({platform})")

    meet("start")  # the first collective follows, and gives up on those who are late (Gloo: after half a minute)
    with Checkpoints(folder / CHECKPOINTS, config.train.keep, json.loads(to_json(config)), say) as checkpoints:
        state = checkpoints.restore(program.like)
        if state is None:
            state = program.initial()
            for name in submission.FILES if process == 0 else ():  # of a run that was here before
                (folder / name).unlink(missing_ok=True)
        done = int(state.step)
        if done >= steps:
            say(f"{folder} is complete: {done} of {steps} steps; {_next(folder)}")
            return
        if done:
            say(f"going on from step {done} of {steps}")
        say("the first step of each length is compiled: half a minute each, on GPUs up to three, or seconds from the cache")

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
                started=started,
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
        found = [measure(state, (jax.tree.map(mine, batch),)) for batch in stages.tests]
        return {f"stage_{what}": [each[f"valid_{what}"] for each in found] for what in ("acc", "exact")}

    return _Course(stages.batch_at, tuple(m for dataset in stages.datasets for m in dataset.messages), test_all)


@dataclass(frozen=True)
class Trained:
    """A run's parameters (their moving average at `step`) on a mesh, ready to answer."""

    run: Run
    mesh: Mesh
    params: Any
    step: int

    def answer(self, tasks: tuple[Task, ...], say: Say | None = None) -> submission.Predictions:
        """Answers every test input of `tasks` as `run.config.eval` says, many processes together; `say` reports progress."""
        return answer(
            assemble.make_decoder(self.run.config, self.mesh),
            self.params,
            tasks,
            checkpoint=self.step,
            **self._work("decoded", say),
        )

    def ranked(
        self, predictions: submission.Predictions, tasks: tuple[Task, ...], say: Say | None = None
    ) -> submission.Predictions:
        """What `answer` found, with the finalists of each vote, if `run.config.eval` wants any, ranked by their likelihood."""
        if not self.run.config.eval.finalists:
            return predictions
        score = partial(assemble.make_scorer(self.run.config, self.mesh), self.params)
        return ranked(predictions, score, tasks, multiple=sharding.row_shards(self.mesh), **self._work("scored", say))

    def _work(self, done: str, say: Say | None) -> dict[str, Any]:
        """What answering and ranking need to know alike; `done` says what happens to sequences."""
        config, processes = self.run.config, jax.process_count()
        return {
            "task_ids": self.run.sets.task_ids,
            "data": config.data,
            "cfg": config.eval,
            "seed": config.train.seed,
            "progress": None if say is None else _pace(done, say),
            "process": (jax.process_index(), processes),
            "gather": _gather if processes > 1 else None,
        }

    def per_recursion(self, tasks: tuple[Task, ...]) -> list[float] | None:
        """The share of test outputs that greedy decoding has right after each recursion; None if no output is known."""
        config = self.run.config
        kernel = grouped.using(config.mesh.grouped)
        steps = jax.jit(kernel(lambda params, batch: transformer.apply(params, batch, config.model, steps=True).steps))
        forward = partial(steps, self.params)
        shares = exact_per_recursion(forward, tasks, self.run.sets.task_ids, config.data, config.eval)
        return None if np.isnan(shares[0]) else shares


def _pace(what: str, say: Say) -> Callable[[int, int], None]:
    """Reports how many of all sequences are done, every five seconds and in the end."""
    started = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and (done == total or now - last > 5):
            last, rate = now, done / max(now - started, 1e-9)
            pace = f"{rate:,.0f} a second" if rate >= 10 else f"{60 * rate:,.0f} a minute"
            say(f"{what} {done:,} of {total:,} sequences, {pace}, {duration((total - done) / rate)} left")

    return progress


def load(run: Run, checkpoint: Which, say: Say) -> Trained:
    """The parameters of a run, from one of its checkpoints, on the devices of this process: of many, each has them all.

    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: the devices do not fit the mesh.
    """
    mesh = sharding.make_mesh(run.config.mesh, local=True)
    say(_devices(mesh))
    spec = transformer.spec(run.config.model, len(run.sets.tasks))
    like = sharding.abstract(mesh, spec, lambda: base.init(jax.random.key(0), spec))
    params, step = restore_params(run.folder / CHECKPOINTS, like, "ema", checkpoint, say)
    return Trained(run, mesh, jax.jit(transformer.refined)(params), step)  # not again for every token


def evaluate(run: Run, checkpoint: Which) -> dict[str, Any] | None:
    """Answers every evaluated test input, writes predictions.json, submission.json and score.json, and returns the score.

    Of many processes each answers its share, on a mesh of its own devices; the first alone writes and says what it does, and the
    others return None. The score's `speed` counts the sequences of all and the seconds from the first prompt to the last answer,
    compilation included.

    Raises:
        CheckpointError, ConfigError: see `load`.
    """
    process, processes = jax.process_index(), jax.process_count()
    say = Progress(0, process=process).line
    trained = load(run, checkpoint, say)
    if processes > 1:
        say(f"{processes} processes share the sequences; progress is that of the first")
    started = time.monotonic()
    predictions = trained.answer(run.sets.evaluation, say)
    seconds = time.monotonic() - started
    predictions = trained.ranked(predictions, run.sets.evaluation, say)
    if process:
        meet("score")
        return None
    for line in predictions.too_long:
        say(line)
    submission.validate_submission(submission.build_submission(predictions), run.sets.evaluation)
    sequences = predictions.sequences
    speed = {"sequences": sequences, "seconds": seconds, "sequences_per_second": sequences / seconds}
    facts: dict[str, Any] = {"eval": asdict(run.config.eval), "speed": speed}
    if run.config.model.recursed:
        facts["greedy_per_recursion"] = trained.per_recursion(run.sets.evaluation)
    score = submission.save(run.folder, predictions, run.config.train.seed, **facts)
    meet("score")
    return score


def _gather(mine: Any) -> Any:
    """Arrays `[P,…]` of each process's own. They meet first, for a collective gives up on those who are late."""
    meet("answers")
    return multihost_utils.process_allgather(mine)


def find_task(run: Run, name: str) -> Task:
    """The task of a run with that id: an evaluated one, or one that was only trained on.

    Raises:
        ConfigError: there is none.
    """
    tasks = {task.id: task for task in (*run.sets.tasks, *run.sets.evaluation) if task.test}
    if name in tasks:
        return tasks[name]
    near = difflib.get_close_matches(name, tasks, 3) or sorted(tasks)[:3]
    like = f", like {', '.join(near)}" if near else ""
    raise ConfigError(f"task {name} is not in {run.folder}, which has {len(tasks)}{like}")


def read_task(run: Run, file: Path) -> Task:
    """A task file of the user's own, for a run that can answer tasks that it was not trained on.

    Raises:
        ConfigError: the run cannot.
        DataError: the file is no valid task.
    """
    if run.config.data.format != "context":
        raise ConfigError(
            f"{run.folder} was trained with data.format pair and knows only its own tasks; for unseen ones train with "
            "--data.format context --model.no-task-embedding"
        )
    return parse_task(file.stem, read_json(file), str(file))


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


def _devices(mesh: Mesh) -> str:
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"devices: {mesh.size} × {mesh.devices.flat[0].device_kind} ({shape}), jax {jax.__version__}"
