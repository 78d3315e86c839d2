"""Checkpoints: a training state on disk, written in the background, restored on any number of devices (Orbax).

`<folder>/<step>/` holds the items `params`, `ema` and `training` (every other field of the state), the run's `config`, under
`metrics` the validation score if there was one, and `checksums.json`, written just before the folder gets its final name. The
newest few and the best are kept. A checkpoint that is not what was written is passed over for the one before, with a line.
"""

import dataclasses
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata.array_metadata_store import Store

from tinyonn_jax.stored import differences
from tinyonn_jax.training.processes import by_first

_OWN_ITEMS = ("params", "ema")
_CHECKSUMS = "checksums.json"
_UNFINISHED = ".orbax-checkpoint-tmp"
_LOST = re.compile(r"Gloo|NCCL|[Cc]oordination|[Bb]arrier|Connection |UNAVAILABLE|DEADLINE_EXCEEDED")  # not the storage
_WHOLE_BELOW = 2**20  # bytes
S = TypeVar("S")
Say = Callable[[str], None]


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be read or written; the message is one line that names the folder and the remedy."""


def steps(folder: Path) -> list[int]:
    """The steps of which `folder` holds a checkpoint, rising, damaged or not."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if path.is_dir() and path.name.isdecimal())


class Checkpoints:
    """The checkpoints of one training run, which alone writes to `folder`.

    Damaged ones are renamed to `<step>.broken` at the start, so that their steps can be saved again. Use it as a context
    manager: leaving it waits until what was saved is on disk.

    Args:
        folder: where they are; made when missing.
        keep: how many of the newest stay, besides the one with the highest score.
        config: stored with each, so that a checkpoint explains itself, and is not taken for one of another network: fields by
            section, `{section: {field: value}}`, of values that JSON has.
        say: prints one line.

    Raises:
        CheckpointError: there are checkpoints and all are damaged, or the folder is a file.
        TypeError: `config` is something else.
    """

    def __init__(self, folder: Path, keep: int = 2, config: Mapping[str, Any] | None = None, say: Say = print):
        self.folder, self._config, self._saving = Path(folder).absolute(), _sections(config or {}), 0
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is a file, where checkpoints belong; move it away")
        _tidy(self.folder, say)
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={name: _writer() for name in (*_OWN_ITEMS, "training")} | {"config": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                best_fn=_rank,
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), policies.BestN(get_metric_fn=_rank, n=1)]
                ),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._one_line():
            self._manager.close()

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Starts to write `state` (a dataclass with `params` and `ema`) and returns once it may be donated.

        A step that is there already is left alone. The highest finite `score` marks the best checkpoint.

        Raises:
            CheckpointError: this save, or the one still in flight, could not be written; the one before it is intact.
            TypeError: the state is something else.
            ValueError: an array of it has no elements, which Orbax does not store, or was donated to a step.
        """
        items = {name: ocp.args.PyTreeSave(_storable(tree)) for name, tree in _items(state).items()}
        with self._one_line():
            self._manager.wait_until_finished()
            if step in self._manager.all_steps():
                return
            self._saving = step
            metrics = {"score": None if score is None or not math.isfinite(score) else float(score)}
            arguments = ocp.args.Composite(config=ocp.args.JsonSave(self._config), **items)
            if not self._manager.save(step, args=arguments, metrics=metrics, force=True):
                raise OSError(f"Orbax declined to save step {step}")

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
            CheckpointError: a save could not be written; the one before it is intact.
        """
        with self._one_line():
            self._manager.wait_until_finished()

    def restore(self, like: S) -> S | None:
        """The newest state, or None when there is no checkpoint yet.

        `like` is a state of arrays or `jax.ShapeDtypeStruct`s; shapes, types and shardings are taken from it.

        Raises:
            CheckpointError: it holds another kind of state, or was trained with another configuration.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        _same_config(self.folder / str(step), self._config)
        read = _read(self.folder / str(step), _items(like))
        training = read.pop("training")
        return dataclasses.replace(like, **read, **training)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _seal(self) -> None:
        """Notes what was written, once all of it is and before the folder gets its final name."""
        if jax.process_index() == 0:
            for written in self.folder.glob(f"{self._saving}{_UNFINISHED}*"):
                (written / _CHECKSUMS).write_text(json.dumps(_checksums(written)))

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turns whatever a failed write raises into one line, but for the loss of another process."""
        try:
            yield
        except Exception as error:  # whatever the storage below Orbax raises
            reason = _first_line(error)
            if jax.process_count() > 1 and _LOST.search(reason):
                raise jax.errors.JaxRuntimeError(reason) from error
            intact = f"the one of step {steps(self.folder)[-1]} is intact. " if steps(self.folder) else ""
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be written ({reason}); {intact}"
                "Free some space, or mend what else is wrong there, and run the same command again"
            ) from error


def restore_params(
    folder: Path,
    like: S,
    which: Literal["ema", "params"] = "ema",
    step: int | Literal["latest", "best"] = "latest",
    say: Say = print,
    config: Mapping[str, Any] | None = None,
) -> tuple[S, int]:
    """Parameters of a finished or running run, and their step; changes nothing on disk.

    Args:
        folder: the run's `checkpoints` folder.
        like: parameters or `jax.ShapeDtypeStruct`s; shapes, types and shardings are taken from it.
        which: the moving average, or the parameters as trained.
        step: `best` has the highest validation score; `latest` is the newest that is not damaged.
        config: what the run is said to be trained with.

    Raises:
        CheckpointError: no such checkpoint, or it is damaged, or was trained with another configuration.
    """
    folder = Path(folder).absolute()
    there = steps(folder)
    if not there:
        raise CheckpointError(f"{folder}: no checkpoint yet; train first")
    if isinstance(step, int) and step not in there:
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; saved steps: {', '.join(map(str, there))}")
    good, _ = _undamaged(folder, (lambda _: None) if isinstance(step, int) else say)
    if not good:
        raise CheckpointError(f"{folder}: checkpoints were removed just now; try again")
    try:
        if step == "best":
            ranks = {s: _rank(json.loads((folder / str(s) / "metrics" / "metrics").read_text())) for s in good}
            step = max(good, key=lambda s: (ranks[s], s))
            if ranks[step] == -math.inf:
                raise CheckpointError(
                    f"{folder}: no checkpoint has a validation score; train with --data.holdout, or take latest"
                )
        elif step == "latest":
            step = good[-1]
        elif step not in good:
            raise CheckpointError(f"{folder}: the checkpoint of step {step} is damaged; whole ones: {', '.join(map(str, good))}")
        _same_config(folder / str(step), config or {})
        return _read(folder / str(step), {which: like})[which], step
    except (FileNotFoundError, ValueError) as error:
        if not isinstance(error, FileNotFoundError) and "NOT_FOUND" not in str(error):  # which is what TensorStore says
            raise
        raise CheckpointError(f"{folder}: checkpoints were removed just now; try again") from None  # by who trains there


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of arrays, of which each device that holds a copy writes a part only if that is large.

    By default it does so however small: a slice to compile and to start for every array, which held up training for longer than
    writing them takes.
    """
    # The store, which Orbax's own handler has but does not export, tells keys of random numbers from arrays.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_WHOLE_BELOW, array_metadata_store=Store())
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _items(state: Any) -> dict[str, Any]:
    """The separately stored parts of a state."""
    if not (dataclasses.is_dataclass(state) and all(hasattr(state, name) for name in _OWN_ITEMS)):
        raise TypeError(f"a checkpoint is of a dataclass with params and ema, as TrainState is, not of {type(state).__name__}")
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    own = {name: fields.pop(name) for name in _OWN_ITEMS}
    return {**own, "training": fields}


def _storable(tree: Any) -> Any:
    """A tree whose arrays are JAX's, and can be stored.

    Raises:
        ValueError: one cannot.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(f"{name} was donated to a step: save the state that the step returned")
        if np.size(leaf) == 0:
            raise ValueError(f"{name} has shape {list(np.shape(leaf))}: arrays without elements are not stored")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf, tree)


def _sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON gives it back, if it is fields by section."""
    if not all(isinstance(fields, Mapping) for fields in config.values()):
        raise TypeError(f"config must hold fields by section, {{section: {{field: value}}}}, not {dict(config)}")
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise TypeError(f"config must hold values that JSON has ({error})") from None


def _same_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that was stored with another configuration."""
    changed = differences(json.loads((path / "config" / "metadata").read_text()), config)
    if changed:
        raise CheckpointError(
            f"{path} was trained with another configuration than the run's config.json: {'; '.join(changed)}; it was edited, or "
            "fields of it were lost: correct it there"
        )


def _read(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The items named in `like` of one checkpoint, in the shapes, types and shardings given there.

    Shapes are compared first: what Orbax itself raises about a wrong one comes with pages of its own. What is read is asked for
    as it was written: a part that is None here may have had no place there.
    """
    handler, found = ocp.StandardCheckpointHandler(), {}
    with ocp.Checkpointer(handler) as reader:
        for item, tree in like.items():
            there: Any = handler.metadata(path / item).tree  # pyright: ignore[reportArgumentType]
            written, wanted = _arrays(there), _arrays(tree)
            odd = sorted(name for name in written.keys() | wanted.keys() if _shape(written, name) != _shape(wanted, name))
            if odd:
                raise CheckpointError(
                    f"{path} holds the state of another network, rule, optimizer or version ({item}/{odd[0]}: "
                    f"{_shape(written, odd[0])} there, {_shape(wanted, odd[0])} here); move the run folder away to start again"
                )
            asked = ocp.tree.from_flat_dict(jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted), there, sep="/")
            read = reader.restore(path / item, args=ocp.args.StandardRestore(asked))
            found[item] = ocp.tree.from_flat_dict(_arrays(read), tree, sep="/")
    return found


def _arrays(tree: Any) -> dict[str, Any]:
    """Every array, or what stands for one, by its path."""
    return ocp.tree.to_flat_dict(tree, sep="/")


def _shape(arrays: Mapping[str, Any], name: str) -> tuple[int, ...] | str:
    """As it is stored: of keys of random numbers, that of their data."""
    if name not in arrays:
        return "nothing"
    keys = jnp.issubdtype(arrays[name].dtype, jax.dtypes.prng_key)
    return tuple((jax.eval_shape(jax.random.key_data, arrays[name]) if keys else arrays[name]).shape)


def _checksums(path: Path) -> dict[str, int]:
    """The CRC-32 of every file below `path`, save those that Orbax touches when it commits."""
    later = (_CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in later)
    return {str(file.relative_to(path)): _checksum(file) for file in files}


def _checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return crc


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; empty when they are as written."""
    try:
        json.loads((path / "_CHECKPOINT_METADATA").read_text())
        written, there = json.loads((path / _CHECKSUMS).read_text()), _checksums(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "it is empty or incomplete"
    except OSError as error:  # nothing is known of the checkpoint then
        file = error.filename or path
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); mend that, then start again") from None
    changed = [name for name in written if written[name] != there.get(name)]
    return f"{changed[0]} is {'damaged' if changed[0] in there else 'missing'}" if changed else ""


def _undamaged(folder: Path, say: Say) -> tuple[list[int], dict[int, str]]:
    """The steps whose files are as written, and what is wrong with the others; says the latter. One that was removed meanwhile,
    by who trains there, is neither."""
    found = {step: _damage(folder / str(step)) for step in steps(folder)}
    reasons = {step: reason for step, reason in found.items() if not reason or (folder / str(step)).exists()}
    good, bad = [s for s, reason in reasons.items() if not reason], {s: reason for s, reason in reasons.items() if reason}
    if bad and not good:
        step, reason = max(bad.items())
        raise CheckpointError(f"{folder}: no checkpoint can be read (step {step}: {reason}); move the folder away to start again")
    for step, reason in bad.items():
        instead = f"falling back to step {good[-1]}" if step > good[-1] else "passed over"
        say(f"checkpoint {folder / str(step)} cannot be read ({reason}); {instead}")
    return good, bad


def _set_aside(path: Path) -> None:
    """Renames a damaged checkpoint."""
    aside = path.with_name(f"{path.name}.broken")
    _remove(aside)
    path.rename(aside)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _tidy(folder: Path, say: Say) -> None:
    """One process sets damaged checkpoints aside and removes unfinished ones; the others wait, and learn whether any is left."""
    with by_first(CheckpointError) as first:
        if first:
            for step in _undamaged(folder, say)[1]:
                _set_aside(folder / str(step))
            for unfinished in folder.glob(f"*{_UNFINISHED}*"):
                _remove(unfinished)


def _rank(metrics: Mapping[str, float | None]) -> float:
    score = metrics["score"]
    return -math.inf if score is None else score


def _first_line(error: BaseException) -> str:
    """What went wrong, short: both ends of the innermost cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line if len(line) < 240 else line[:120] + ' … ' + line[-120:]}"
