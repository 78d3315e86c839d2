"""What the processes of one run tell each other besides the arrays of a step.

They meet first, however long that takes: a collective gives up on those who are late (Gloo: after half a minute).
"""

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tinyonn_jax.config import ConfigError

_FOREVER = 30 * 24 * 3_600_000  # milliseconds
_PATIENCE = 15  # seconds that a file may take to be seen elsewhere
_WORDS = 2000  # bytes
E = TypeVar("E", bound=Exception)


def meet(place: str) -> None:
    """Returns when all processes are here, however long that takes; an error if one of them dies."""
    ocp.multihost.get_barrier_sync_fn()(key=place, timeout_ms=_FOREVER)


def gather(mine: Any, place: str) -> Any:
    """Arrays `[P,…]` of each process's own `[…]`, in every process."""
    meet(place)
    return multihost_utils.process_allgather(mine)


def agree(**facts: str) -> None:
    """Checks that what each process says of itself, by name, is what the others say.

    Raises:
        ConfigError: it is not, in every process: each would go on with something else.
    """
    everyone = gather(np.array([zlib.crc32(fact.encode()) for fact in facts.values()], np.uint32), "facts")  # [P,facts]
    if different := [name for name, said in zip(facts, everyone.T, strict=True) if len(np.unique(said)) > 1]:
        raise ConfigError(
            f"the processes of this run were started with different {' and '.join(different)}: give all of them the same "
            "command, code and data"
        )


@contextmanager
def by_first(kind: type[E]) -> Iterator[bool]:
    """For what the first process alone does: it is given True, the others False. An error of that kind, or an OSError, is raised
    in all of them, in its words."""
    error: Exception | None = None
    try:
        yield jax.process_index() == 0
    except (kind, OSError) as raised:
        error = raised
    if jax.process_count() > 1:
        meet("first")
        words = np.frombuffer(str(error or "").encode()[:_WORDS].ljust(_WORDS), np.uint8)
        said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint8)).decode(errors="replace").strip()
        error = error or (kind(said) if said else None)
    if error is not None:
        raise error


def share(folder: Path) -> None:
    """Checks that all processes see the folder that the first one writes to.

    Raises:
        ConfigError: one does not, in every process.
    """
    meet("folder")
    name = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint32))
    mark, first = Path(folder) / f".shared-{name[0]:08x}{name[1]:08x}", jax.process_index() == 0
    try:
        if first:
            mark.touch()
        meet("mark")
        until = time.monotonic() + _PATIENCE
        while not mark.exists() and time.monotonic() < until:
            time.sleep(0.5)
        blind = np.flatnonzero(~gather(np.bool_(mark.exists()), "seen"))
    finally:
        if first:
            mark.unlink(missing_ok=True)
    if blind.size:
        raise ConfigError(
            f"{folder}: process {blind[0]} sees another folder of this name, or none; --workdir must be the same one for all, "
            "on a file system that they share"
        )
