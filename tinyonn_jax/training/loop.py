"""The training loop: dispatches steps, logs, validates, checkpoints, and stops when told to; knows nothing of the task.

The host never stalls the device: while step n runs, step n−1 is looked at. All rows up to a step are on disk before its
checkpoint is, so a run that is killed at any moment and started again leaves the same files as one that was not. Steps count
from 1: row, checkpoint and state n are those after n updates.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinyonn_jax.config import TrainConfig
from tinyonn_jax.training.checkpoint import Checkpoints


class State(Protocol):
    """Any state that counts the steps done."""

    @property
    def step(self) -> Any: ...


S = TypeVar("S", bound=State)
B = TypeVar("B")


class Writer(Protocol):
    """Where rows of metrics go."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...


class Display(Protocol):
    """What a person sees meanwhile."""

    def update(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def line(self, text: str) -> None: ...


class DivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; the message is one line with the remedy."""


class InterruptedRun(Exception):
    """The run was told to stop by signal `signum` and is saved at `step`."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, which is saved")
        self.signum, self.step = signum, step


@dataclass
class _Pace:
    """Real tokens, FLOPs and seconds since the last logged row, without those spent on validation and checkpoints."""

    tokens: int
    flops: float
    since: float

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began


def run(
    step: Callable[[S, Any], tuple[S, dict[str, Any]]],
    state: S,
    batch_at: Callable[[int], B],
    cfg: TrainConfig,
    checkpoints: Checkpoints,
    writer: Writer,
    display: Display,
    *,
    max_skipped: int,
    put: Callable[[B], Any] = lambda batch: batch,
    tokens: Callable[[B], int] = lambda batch: 0,
    flops: Callable[[B], float] = lambda batch: 0.0,
    validate: Callable[[S], dict[str, float]] | None = None,
    on_checkpoint: Callable[[int, S, dict[str, Any]], None] | None = None,
    started: float | None = None,
) -> S:
    """Trains from `state.step` to `cfg.steps` and returns the last state.

    Args:
        step: jitted `(state, batch) -> (state, metrics)`; the metric `skipped` counts consecutive skipped steps.
        state: donated.
        batch_at: the host batch of the step with that index, from 0; a pure function.
        max_skipped: consecutive skipped steps that end the run.
        put: brings a host batch to the devices.
        tokens: real tokens in a host batch.
        flops: FLOPs that a step on it needs, by formula.
        validate: measures a state; its numbers join that step's row, and `valid_exact` ranks the checkpoint.
        on_checkpoint: called with each step that is saved, its state and metrics.
        started: `time.time()` when the program started.

    Raises:
        InterruptedRun: SIGINT or SIGTERM came; the state is saved at the step it names. A second signal ends all at once.
        DivergedError: too many steps in a row were skipped.
        CheckpointError: a checkpoint could not be written.
    """
    started = time.time() if started is None else started
    pace = _Pace(0, 0.0, time.perf_counter())

    def look_at(n: int, metrics: dict[str, Any], batch: B, validation: Mapping[str, float] | None = None) -> None:
        """Checks step n and writes its row if one is due. Reading `skipped` waits for it, so that few steps are in flight."""
        skipped = int(metrics.get("skipped", 0))
        if skipped >= max_skipped:
            raise DivergedError(
                f"stopped at step {n}: {skipped} steps in a row had a loss or gradient that is not finite (optim.max_skipped); "
                "begin another run (--workdir) with a lower optim.lr, optim.muon_lr or optim.meta_lr"
            )
        seen = tokens(batch)
        pace.tokens, pace.flops = pace.tokens + seen, pace.flops + flops(batch)
        if n == 1 or n % cfg.log_every == 0 or n == cfg.steps or validation is not None:
            now = time.perf_counter()
            took = max(now - pace.since, 1e-9)
            row = {
                "tokens": seen,
                **jax.device_get(metrics),
                **(validation or {}),
                "seconds": round(time.time() - started, 3),
                "tokens_per_second": round(pace.tokens / took, 1),
                "flops_per_second": round(pace.flops / took),
            }
            pace.tokens, pace.flops, pace.since = 0, 0.0, now
            writer.write(n, row)
            display.update(n, row)

    last: tuple[int, dict[str, Any], B] | None = None
    # Of several processes only the first has a display, and each may be the one that is told to stop.
    say = display.line if jax.process_index() == 0 else partial(print, file=sys.stderr, flush=True)
    with stop_signals(say) as stop:
        for n in range(int(state.step) + 1, cfg.steps + 1):
            batch = batch_at(n - 1)
            state, metrics = step(state, put(batch))
            if last is not None:
                look_at(*last)
            last = (n, metrics, batch)

            stopping = _agree(stop, n % min(cfg.log_every, _ASK_EVERY) == 0)
            validating = validate is not None and (n == cfg.steps or (cfg.validate_every > 0 and n % cfg.validate_every == 0))
            if not (stopping or validating or n % cfg.checkpoint_every == 0 or n == cfg.steps):
                continue
            validation = None
            if validate is not None and validating:
                jax.block_until_ready(metrics)
                with pace.paused():
                    validation = validate(state)
            look_at(*last, validation)
            last = None
            with pace.paused():
                checkpoints.save(n, state, None if validation is None else validation.get("valid_exact"))
                if on_checkpoint is not None:
                    on_checkpoint(n, state, metrics)
            if stopping:
                checkpoints.wait()
                raise InterruptedRun(stopping, n)
        checkpoints.wait()
        if stopping := _agree(stop, True):  # came too late to stop a step: whatever would follow this run is not wanted
            raise InterruptedRun(stopping, cfg.steps)
    return state


_ASK_EVERY = 20  # steps, or more often: processes ask each other whether to stop, within a scheduler's patience


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in the list it yields instead of dying of them; a second one kills as usual."""
    received: list[int] = []

    def note(signum: int, _: Any) -> None:
        received.append(signum)
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        when = "after this step" if jax.process_count() == 1 else "when all processes know of it, in a few steps"
        say(f"{signal.Signals(signum).name}: saving {when}; once more to stop at once")

    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(each, note) for each in handled]
    try:
        yield received
    finally:
        for each, handler in zip(handled, before, strict=True):
            signal.signal(each, handler)


def _agree(received: list[int], ask: bool) -> int:
    """The signal to stop for, or 0: the same in every process, which several find out only when `ask`."""
    mine = received[0] if received else 0
    if jax.process_count() == 1:
        return mine
    return int(np.max(multihost_utils.process_allgather(np.int32(mine)))) if ask else 0
