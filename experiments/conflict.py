"""Does one global loss make the gradients conflict? `python experiments/conflict.py [--steps N] [--seed N ...]`.

Three networks of the same shape learn the same thing from real ARC-AGI-1 demonstrations, in equally many steps: the colour of an
output cell, from the 5 x 5 input cells around it and the task. At regular steps the gradient of the task loss is compared with
that of the regulariser, over the weights that both reach:

  SBL, one global loss   Bayesian layers, task + beta * KL            the regulariser is the KL
  SPL, isolated          routed neurons, hard gating, rule sars       the regulariser is the routers' meta loss
  SPL, not isolated      the same with soft gating, so that the task loss teaches the routers too

A cosine of -1 is plain opposition. With isolation nothing is shared and the cosine is undefined: that is measured at every
record, and the script fails if it is not so. It writes conflict.json (every number) and conflict.png into --workdir when it is
done; Ctrl-C leaves no files.
"""

import argparse
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from tinyonn_jax import cli
from tinyonn_jax.arc.sets import load_task_sets
from tinyonn_jax.arc.tasks import Pair
from tinyonn_jax.arc.tokens import COLOURS
from tinyonn_jax.config import ConfigError, OptimConfig
from tinyonn_jax.layers import base, sbl, spl
from tinyonn_jax.layers.routing import RouterConfig
from tinyonn_jax.learning.conflict import meet, meta_gradient
from tinyonn_jax.learning.rule import LearningRule, MetaState, none, routers, without_routers
from tinyonn_jax.learning.sars import sars
from tinyonn_jax.observe import axes
from tinyonn_jax.observe.conflict import conflict_figure
from tinyonn_jax.observe.console import table
from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.observe.metrics import column, percent
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import Aux, TrainState, init_state, make_train_step
from tinyonn_jax.training.loop import DivergedError
from tinyonn_jax.training.optim import make_optimizer

HIDDEN = 32  # neurons of each of the two layers
REACH = 2  # input cells seen on each side of the one in question
DRAWS = 16  # of an SBL's weights, over which its task gradient is averaged when it is measured
RECORDS = 24  # measurements in one run, besides the one before the first step
OPTIM = OptimConfig(matrices="adamw", weight_decay=0.0)  # a decay would be a second regulariser


# --- data ---------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Cells as features `x [N,I]`, the colours `y [N]` they become, and the key that weights are drawn by."""

    x: Float[Array, "N I"]
    y: Int[Array, " N"]
    key: Array


def cells(tasks: Sequence[Sequence[Pair]], key: Array) -> Batch:
    """Every cell of every pair: one-hot colours of the cells around it (an eleventh is the outside), one-hot task."""
    around, task, colours = [], [], []
    window = 2 * REACH + 1
    for row, pairs in enumerate(tasks):
        for pair in pairs:
            padded = np.pad(pair.input, REACH, constant_values=COLOURS)
            around.append(np.lib.stride_tricks.sliding_window_view(padded, (window, window)).reshape(-1, window**2))
            task.append(np.full(pair.input.size, row))
            colours.append(np.ravel(np.asarray(pair.output, np.int32)))
    near = np.eye(COLOURS + 1, dtype=np.float32)[np.concatenate(around)].reshape(-1, window**2 * (COLOURS + 1))
    which = np.eye(len(tasks), dtype=np.float32)[np.concatenate(task)]
    return Batch(jnp.asarray(np.concatenate([near, which], 1)), jnp.asarray(np.concatenate(colours)), key)


def demonstrations() -> list[list[Pair]]:
    """For each task of preset `demo` that has any, its demonstrations in which the grid keeps its size; never a test pair."""
    tasks = load_task_sets(PRESETS["demo"][1].data).tasks
    same = [[pair for pair in task.train if pair.output is not None and pair.input.shape == pair.output.shape] for task in tasks]
    return [pairs for pairs in same if pairs]


# --- networks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Two layers and a linear readout. `task(params, taps, batch) -> (task loss, Aux)`; `logits(params, x)` by mean weights.

    `penalty(params)` is added to the loss; where it is None, the regulariser is the meta loss of `rule`. `isolated` promises
    that the two gradients share no weight.
    """

    label: str
    spec: Any
    rule: LearningRule
    task: Callable[[Any, Any, Batch], tuple[Array, Aux]]
    logits: Callable[[Any, Array], Array]
    penalty: Callable[[Any], Array] | None = None
    isolated: bool = False

    def loss(self, params: Any, taps: Any, batch: Batch) -> tuple[Array, Aux]:
        """What the train step minimises."""
        loss, aux = self.task(params, taps, batch)
        return loss + (self.penalty(params) if self.penalty else 0.0), aux


def readout() -> dict[str, base.Param]:
    """A linear map from the last layer to colours, of which no regulariser knows."""
    w = base.Param((HIDDEN, COLOURS), (None, None), base.fan_in)
    return {"w_out": w, "bias": base.Param((COLOURS,), (None,), base.zeros)}


def score(logits: Float[Array, "N V"], y: Int[Array, " N"]) -> tuple[Array, Array]:
    """Mean cross-entropy in nats, and the share of cells that are right."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, jnp.mean(jnp.argmax(logits, -1) == y)


def bayesian(inputs: int, beta: float) -> Network:
    """SBLs on one global loss, task + beta · KL."""
    first, second = sbl.Config(inputs, HIDDEN), sbl.Config(HIDDEN, HIDDEN)

    def logits(params, x, keys=(None, None)):
        x = sbl.apply(params["first"], x, first, keys[0])
        x = sbl.apply(params["second"], x, second, keys[1])
        return x @ params["readout"]["w_out"] + params["readout"]["bias"]

    def task(params, taps, batch):
        one, two = jax.random.split(batch.key)
        loss, accuracy = score(logits(params, batch.x, (one, two)), batch.y)
        return loss, Aux({}, {"main_acc": accuracy})

    def penalty(params):
        return beta * (sbl.divergence(params["first"]) + sbl.divergence(params["second"]))

    spec = {"first": sbl.spec(first), "second": sbl.spec(second), "readout": readout()}
    return Network("SBL, one global loss", spec, none(), task, logits, penalty)


def routed(inputs: int, isolate: bool) -> Network:
    """SPLs taught by surprise: hard and isolated, or soft with routers that the task loss reaches too."""
    router = RouterConfig(HIDDEN, 0, select="hard" if isolate else "relu", isolate=isolate)
    first, second = spl.Config(inputs, router), spl.Config(HIDDEN, router)

    def forward(params, x, taps):
        x, one = spl.apply(params["first"], x, first, tap=taps and taps["first"])
        x, two = spl.apply(params["second"], x, second, tap=taps and taps["second"])
        return x @ params["readout"]["w_out"] + params["readout"]["bias"], {"first": one, "second": two}

    def task(params, taps, batch):
        logits, routings = forward(params, batch.x, taps)
        loss, accuracy = score(logits, batch.y)
        return loss, Aux(routings, {"main_acc": accuracy})

    spec = {"first": spl.spec(first), "second": spl.spec(second), "readout": readout()}
    label = "SPL, isolated" if isolate else "SPL, not isolated"
    return Network(
        label, spec, sars()._replace(isolate=isolate), task, lambda params, x: forward(params, x, None)[0], isolated=isolate
    )


# --- measuring ----------------------------------------------------------------------------------------------------------


def leaves(grads: Any, name: str) -> list[Array]:
    """The leaves of that name, of all layers."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if jax.tree_util.keystr(path).endswith(f".{name}")]


def gradients(network: Network, params: Any, meta: MetaState, batch: Batch) -> tuple[Any, Any]:
    """The gradients of task loss and regulariser, each on every weight; the task's is the mean over draws of the weights."""
    keys = jax.random.split(batch.key, DRAWS)
    each = jax.vmap(lambda key: jax.grad(lambda p: network.task(p, None, batch._replace(key=key))[0])(params))(keys)
    if network.penalty:
        regulariser = jax.grad(network.penalty)(params)
    else:
        regulariser = meta_gradient(network.task, network.rule, params, meta, batch)
    return jax.tree.map(lambda g: jnp.mean(g, 0), each), regulariser


def measure(network: Network, state: TrainState, batch: Batch) -> dict[str, Array]:
    """How both gradients meet, in all and on each kind of weight; what each reaches across the partition; the task's score."""
    task, regulariser = gradients(network, state.params, state.meta, batch)
    whole = meet(task, regulariser)
    kinds = ("mu", "log_scale") if network.penalty else ("proto", "gate")
    loss, accuracy = score(network.logits(state.params, batch.x), batch.y)
    return {
        "cosine": whole.cosine,
        **{f"cosine_{kind}": meet(leaves(task, kind), leaves(regulariser, kind)).cosine for kind in kinds},
        "task": whole.task,
        "regulariser": whole.regulariser,
        "shared": whole.shared,
        "shared_share": whole.shared / sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "task_on_routers": meet(routers(task), routers(regulariser)).task,
        "regulariser_elsewhere": meet(without_routers(task), without_routers(regulariser)).regulariser,
        "task_loss": loss,
        "task_acc": accuracy,
    }


def check_isolation(row: dict[str, Any]) -> None:
    """Each loss must reach something, and nothing of the other's.

    Raises:
        RuntimeError: it is not so.
    """
    if row["task_on_routers"] or row["regulariser_elsewhere"] or row["shared"] or not (row["task"] and row["regulariser"]):
        raise RuntimeError(f"isolation does not hold: {row}")


def say(network: Network, seed: int, steps: int, row: dict[str, Any]) -> None:
    """A line of progress."""
    cosine = "undefined" if row["cosine"] is None else f"{row['cosine']:+.2f}"
    print(
        f"{network.label}, seed {seed}: step {row['step']}/{steps}  task loss {row['task_loss']:.4f}  "
        f"weights reached by task {row['task']}, regulariser {row['regulariser']}, both {row['shared']}  cosine {cosine}",
        flush=True,
    )


def train(network: Network, batch: Batch, steps: int, seeds: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """For each seed, what `measure` found on the way; numbers that are not finite are None."""
    tx = make_optimizer(OPTIM, steps)
    step = make_train_step(network.loss, network.rule, tx)
    look = jax.jit(partial(measure, network))
    recorded = {round(i * steps / RECORDS) for i in range(RECORDS + 1)}
    for seed in seeds:
        key = jax.random.key(seed)
        params = base.init(key, network.spec)
        state = init_state(network.loss, network.rule, tx, params, batch, seed)
        rows: list[dict[str, Any]] = []
        for i in range(steps + 1):
            batch = batch._replace(key=jax.random.fold_in(key, i))
            if i in recorded:
                found = {name: value.item() for name, value in look(state, batch).items()}
                rows.append({"step": i, **{name: value if np.isfinite(value) else None for name, value in found.items()}})
                if rows[-1]["task_loss"] is None:
                    raise DivergedError(f"{network.label}, seed {seed}: the task loss is not finite at step {i}")
                if network.isolated:
                    check_isolation(rows[-1])
                if len(rows) % 8 == 1:
                    say(network, seed, steps, rows[-1])
            if i < steps:
                state, _ = step(state, batch)
        yield rows


def summary(label: str, runs: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """A line of the table: cosines over all records of all seeds, and means over seeds at the end."""
    cosines = np.concatenate([column(rows, "cosine")[1] for rows in runs])
    last = column([rows[-1] for rows in runs], "cosine")[1]
    shared = sorted(row["shared"] for rows in runs for row in rows)
    angle = ["undefined", "–", "–"]
    if len(cosines):
        span = f"{np.median(cosines):+.2f} ({cosines.min():+.2f} to {cosines.max():+.2f})"
        angle = [span, percent(float(np.mean(cosines < 0))), f"{last.mean():+.2f}" if len(last) else "undefined"]
    loss, accuracy = (float(np.mean([rows[-1][key] for rows in runs])) for key in ("task_loss", "task_acc"))
    return [label, *angle, f"{shared[0]} to {shared[-1]}", f"{loss:.4f}", percent(accuracy)]


def main() -> None:
    """Trains, measures, prints a table, writes JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/conflict"), help="where the files go (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of each run, on all cells each (default: %(default)s)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="a run for each (default: 0 1 2)")
    parser.add_argument(
        "--temper",
        type=float,
        default=0.03,
        help="beta times the number of cells; 1 is the evidence lower bound (ELBO), with which the SBL learns nothing from so "
        "few cells; the default is the largest of 1, 0.1, 0.03, 0.01 with which it gets nine in ten right (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {args.steps}")
    if not 0 < args.temper < math.inf:
        raise ConfigError(f"--temper must be positive and finite, got {args.temper}: without the KL there is nothing to compare")
    if len(set(args.seed)) < len(args.seed):
        raise ConfigError(f"--seed must name each once, got {' '.join(map(str, args.seed))}")
    cli.set_up()
    args.workdir.mkdir(parents=True, exist_ok=True)
    pairs = demonstrations()
    batch = cells(pairs, jax.random.key(0))
    count, inputs = batch.x.shape
    print(f"{count} cells of {sum(map(len, pairs))} demonstrations of {len(pairs)} tasks; all scores are on these", flush=True)
    networks = (bayesian(inputs, args.temper / count), routed(inputs, isolate=True), routed(inputs, isolate=False))
    found = {network.label: list(train(network, batch, args.steps, args.seed)) for network in networks}
    header = ["", "cosine, median (range)", "below 0", "at the end", "weights both reach", "task loss", "cells right"]
    table(f"{len(args.seed)} seeds, {args.steps} steps", header, [summary(label, runs) for label, runs in found.items()])
    settings = {"steps": args.steps, "seeds": args.seed, "temper": args.temper, "beta": args.temper / count, "cells": count}
    text = json.dumps({"settings": settings, "runs": found}, indent=1, allow_nan=False)
    print(write_atomically(args.workdir / "conflict.json", text + "\n"))
    print(axes.save(conflict_figure(found), args.workdir / "conflict.png"))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, cli.interrupted)
    cli.leave(cli.guard(main))
