"""Files of a run folder: written in one move, and read with a word on what to do about a damaged one."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tinyonn_jax.config import Config, ConfigError
from tinyonn_jax.stored import from_json

CONFIG, ORIGIN, TASKS, PARAMETERS = "config.json", "run.json", "tasks.json", "parameters.json"
METRICS, ROUTING = "metrics.jsonl", "routing_latest.npz"
ANSWERS = PREDICTIONS, SUBMISSION, SCORE = "predictions.json", "submission.json", "score.json"


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Replaces a file in one move, making its folder: whoever reads it, and whenever, sees all of the old or all of the new.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the temporary one
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def read_json(path: Path) -> Any:
    """What a JSON file holds; None when there is none.

    Raises:
        ConfigError: it is not JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); delete it, or write it again with train or evaluate") from None


def read_config(folder: Path) -> Config | None:
    """The run's configuration; None when there is none, or when this version cannot read it."""
    try:
        return from_json((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, ConfigError):
        return None


def stored_origin(folder: Path, what: Literal["preset", "command"] = "preset") -> str | None:
    """What a run began with, where that is known."""
    try:
        noted = json.loads((folder / ORIGIN).read_text(encoding="utf-8")).get(what)
    except (OSError, ValueError, AttributeError):
        return None
    return noted if isinstance(noted, str) else None


def require_run(folder: Path) -> None:
    """Nothing, for a run folder.

    Raises:
        ConfigError: the folder does not exist, or holds nothing of a run.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a run folder")
    train = f"python experiments/arc.py train --workdir {shlex.quote(str(folder))}"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run folder; train writes it: {train}")
    if not any((folder / name).exists() for name in (CONFIG, METRICS)):
        raise ConfigError(f"{folder}: no run folder, it has neither {CONFIG} nor {METRICS}; train writes them: {train}")


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Names the file where what it holds cannot be used.

    Raises:
        ConfigError: it could not.
    """
    try:
        yield
    except ConfigError:  # which says more
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ConfigError(f"{path}: damaged ({error!r}); delete it, or write it again with train or evaluate") from None
