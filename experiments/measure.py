"""What rows of a benchmark are made with: the clock, the steps that are compared, and the report of what was found."""

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinyonn_jax.arc import tokens
from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.config import Config, LearningConfig, ModelConfig, OptimConfig
from tinyonn_jax.layers import base
from tinyonn_jax.learning.rule import backprop
from tinyonn_jax.learning.signals import l1_norm
from tinyonn_jax.models import transformer
from tinyonn_jax.observe import console
from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.training import optim
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured figure: ok when value ≤ limit, or ≥ limit with `least`.

    Without a limit it is only to be known; without a value it was not measured, or could not be for the `error`.
    """

    row: str
    value: float | None
    limit: float | None = None
    unit: str = "ratio"
    least: bool = False
    error: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the value keeps its limit; an error does not, and None is neither."""
        if self.limit is None or (self.value is None and not self.error):
            return None
        if self.value is None:
            return False
        return self.value >= self.limit if self.least else self.value <= self.limit


def clock() -> float:
    """Seconds of CPU time on a CPU, of wall time elsewhere."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def medians(functions: dict[str, Callable[[], Any]], repeats: int = 9, seconds: Callable[[], float] = clock) -> dict[str, float]:
    """Median seconds of each function, warmed up, runs interleaved in random order."""
    for function in functions.values():
        jax.block_until_ready(function())
    taken: dict[str, list[float]] = {name: [] for name in functions}
    order = [name for name in functions for _ in range(repeats)]
    random.Random(0).shuffle(order)
    for name in order:
        start = seconds()
        jax.block_until_ready(functions[name]())
        taken[name].append(seconds() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def random_batch(sequences: int, length: int) -> Any:
    """Random tokens on random cells, the second half trained on."""
    rng = np.random.default_rng(0)
    mask = np.zeros((sequences, length), np.float32)
    mask[:, length // 2 : -1] = 1
    zeros = np.zeros(sequences, np.int32)
    return jax.tree.map(
        jnp.asarray,
        Batch(
            tokens=rng.integers(0, tokens.VOCAB, (sequences, length), np.int32),
            positions=rng.integers(0, 10, (sequences, length, 3)).astype(np.int32),
            prefix=zeros + length // 2,
            length=zeros + length,
            loss_mask=mask,
            task=zeros,
            dihedral=zeros,
        ),
    )


def _every_signal(routers: Any, routings: Any, signals: Any, meta: Any) -> Any:
    """An objective that teaches nothing, but reads all there is: what nothing reads XLA leaves out."""
    return jnp.float32(0), {"signals": sum(jnp.max(l1_norm(leaf)) for leaf in jax.tree.leaves(signals))}


def whole_step(model: ModelConfig, batch: Batch, rule: str = "sars") -> tuple[Callable[[], Any], Any]:
    """The project's whole train step as a closure that carries its state along, and the compiled program. With rule none its
    routers learn nothing, but every signal is read."""
    config = dataclasses.replace(Config(), model=model, learning=LearningConfig(rule=rule))  # pyright: ignore[reportArgumentType]
    learning = make_rule(config)
    if rule == "none":
        learning = learning._replace(objective=_every_signal)
    loss = make_loss(config, learning)
    tx = optim.make_optimizer(OptimConfig(matrices="adamw"), 1000)
    params = jax.jit(lambda key: base.init(key, transformer.spec(model, 1)))(jax.random.key(0))
    box = [init_state(loss, learning, tx, params, batch)]
    program = make_train_step(loss, learning, tx, ema=0.995).lower(box[0], batch).compile()

    def run():
        box[0], metrics = program(box[0], batch)
        return metrics["main_loss"]

    return run, program


def plain_step(model: ModelConfig, batch: Batch) -> Callable[[], Any]:
    """The conventional step: same forward, router through the main loss, one AdamW; no signals, no meta loss, no bookkeeping."""
    config = dataclasses.replace(Config(), model=model)
    loss = make_loss(config, backprop())
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optim.schedule(3e-3, 1000, OptimConfig()), weight_decay=0.1))
    params = jax.jit(lambda key: base.init(key, transformer.spec(model, 1)))(jax.random.key(0))

    def step(params, opt_state, batch):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, None, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    program = jax.jit(step, donate_argnums=(0, 1))
    box = [params, tx.init(params)]

    def run():
        box[0], box[1], value = program(box[0], box[1], batch)
        return value

    return run


def json_file(text: str) -> Path:
    """A file to be written, as an argument of argparse."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it")
    try:  # now, not after all has been measured
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be written to")
    return path


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that `report` takes its file from."""
    help_line = "also write the rows to this file, as they come: a list of {row, value, limit, unit, least, error, ok}"
    parser.add_argument("--json", type=json_file, help=help_line)


def machine() -> str:
    """The device and the rate of a plain float32 matmul on it."""
    a = jnp.ones((2048, 2048))
    f = jax.jit(jnp.matmul)
    rate = 2 * 2048**3 / medians({"a": lambda: f(a, a)}, 5, time.perf_counter)["a"] / 1e9
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}, jax {jax.__version__}, float32 matmul {rate:.0f} GFLOP/s"


def report(measured: Iterable[Row], file: Path | None) -> bool:
    """Prints rows and writes them as JSON as they come, then prints a table; whether none misses its limit."""
    rows = []
    for row in measured:
        print(f"{row.row}: {_shown(row)}", flush=True)
        rows.append(row)
        if file:
            kept = [dataclasses.asdict(row) | {"ok": row.ok} for row in rows]
            write_atomically(file, json.dumps(kept, indent=2) + "\n")
    lines = []
    for row in rows:
        limit = "" if row.limit is None else f"{'≥' if row.least else '≤'} {row.limit:g}"
        lines.append([row.row, _shown(row, unit=False), limit, row.unit, {True: "yes", False: "NO", None: ""}[row.ok]])
    console.table("", ["row", "value", "limit", "unit", "ok"], lines)
    return all(row.ok is not False for row in rows)


def _shown(row: Row, unit: bool = True) -> str:
    if row.value is None:
        return row.error or "not measured"
    return f"{row.value:.4g} {row.unit if unit else ''}".rstrip()
