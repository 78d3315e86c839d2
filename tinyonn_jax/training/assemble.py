"""From a configuration to what runs: the sharded state, the jitted step, the validation, the decoder.

Letters: D model, M modules, L layers.
"""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.arc.forced import exact
from tinyonn_jax.arc.generate import Decoder
from tinyonn_jax.config import Config, ConfigError, ModelConfig
from tinyonn_jax.layers import base, grouped
from tinyonn_jax.layers.layout import over
from tinyonn_jax.layers.routing import data_init, effective
from tinyonn_jax.learning.rule import LearningRule, layers, replace_part, routers
from tinyonn_jax.models import transformer
from tinyonn_jax.training import sharding
from tinyonn_jax.training.objective import make_loss, make_rule, token_losses
from tinyonn_jax.training.optim import make_optimizer, names, schedule
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import LossFn, Step, make_train_step

Validation = Callable[[TrainState, Iterable[Batch]], dict[str, float]]

COMPILER: dict[str, dict[str, Any]] = {"tpu": {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}}
"""Options of the compiler by platform. For TPUs this pass fails with an internal error (libtpu 0.0.42, 0.0.50) where gradients
are summed over fsdp within the scan over recursions."""


@dataclass(frozen=True)
class Program:
    """All that a run needs, on its mesh. `like` is the state as shapes with shardings; `initial()` makes it."""

    config: Config
    mesh: Mesh
    spec: Any
    like: TrainState
    initial: Callable[[], TrainState]
    step: Step

    def put(self, batch: Batch) -> Batch:
        """A host batch, its rows split over the devices."""
        return sharding.shard_batch(self.mesh, batch)


@contextmanager
def placed(config: Config, mesh: Mesh, capacity: float = math.inf) -> Iterator[None]:
    """What is traced within (or by a function decorated with it) runs over the mesh, on the kernel that is configured."""
    with over(sharding.layout(mesh, capacity)), grouped.using(config.mesh.grouped):
        yield


def assemble(config: Config, mesh: Mesh, tasks: int, example: Batch) -> Program:
    """The program of a run with `tasks` tasks; `example` is any batch, the same in every process."""
    rule = make_rule(config)
    loss_fn = placed(config, mesh, config.mesh.capacity)(make_loss(config, rule))
    spec = transformer.spec(config.model, tasks)
    tx = make_optimizer(config.optim, config.train.steps, frozen_routers=config.learning.rule == "none")
    everywhere = NamedSharding(mesh, PartitionSpec())  # on the mesh, as in the step, which then need not trace the loss once more
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=everywhere), spec, is_leaf=base.is_param)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), example)
    routings = jax.eval_shape(loss_fn, shapes, None, batch)[1].routings

    def make() -> TrainState:
        key = jax.random.key(config.train.seed)
        params = base.init(key, spec)
        if config.model.data_init:
            made = loss_fn(params, None, jax.tree.map(jnp.asarray, example))[1].routings
            for i, (name, router) in enumerate(routers(params).items()):
                started = data_init(router, made[name], jax.random.fold_in(key, i))
                params = replace_part(params, name, "router", started)
        return TrainState.create(params, tx, rule.init(params, routings), config.train.seed)

    like = sharding.abstract(mesh, spec, make)
    return Program(
        config=config,
        mesh=mesh,
        spec=spec,
        like=like,
        initial=lambda: sharding.born_sharded(make, like),
        step=_make_step(config, loss_fn, rule, tx, mesh, like),
    )


def _make_step(
    config: Config, loss_fn: LossFn, rule: LearningRule, tx: optax.GradientTransformation, mesh: Mesh, like: TrainState
) -> Step:
    """The train step with the learning rates among its metrics; states keep their shardings."""
    learning, optim, steps = config.learning, config.optim, config.train.steps
    inner = make_train_step(loss_fn, rule, tx, optim.ema, (learning.pi_alpha, learning.pi_gamma))
    rate_main = schedule(optim.muon_lr if optim.matrices == "muon" else optim.lr, steps, optim)
    rate_meta = schedule(0.0 if learning.rule == "none" else optim.meta_lr, steps, optim)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        new, metrics = inner(state, batch)
        updates = state.step - state.skipped_total  # a skipped step leaves the optimizers' own counts as they are
        return new, {**metrics, "lr_main": rate_main(updates), "lr_meta": rate_meta(updates)}

    lies = jax.tree.map(lambda leaf: leaf.sharding, like), NamedSharding(mesh, PartitionSpec())
    options = COMPILER.get(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, out_shardings=lies, compiler_options=options)


def make_validation(program: Program) -> Validation:
    """Measures the average of a state's parameters on batches: loss a token, accuracy of tokens, share of exact sequences."""
    cfg = program.config.model

    @jax.jit
    @placed(program.config, program.mesh)
    def sums(params, batch: Any) -> Array:
        logits = transformer.apply(params, batch, cfg).logits
        loss, right = token_losses(logits, batch.tokens)
        real = batch.length > 0
        each = (loss * batch.loss_mask, right * batch.loss_mask, exact(logits, batch) & real, batch.loss_mask, real)
        return jnp.stack([jnp.sum(x).astype(jnp.float32) for x in each])

    def validate(state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        parts = [np.asarray(sums(state.ema, program.put(batch)), np.float64) for batch in batches]
        loss, right, whole, tokens, sequences = np.sum(parts, 0).tolist()
        return {"valid_loss": loss / tokens, "valid_acc": right / tokens, "valid_exact": whole / sequences}

    return validate


def narrowed(cfg: ModelConfig, parameters: int) -> ModelConfig:
    """The configuration with the hidden width (of an expert, for dyntrm) that brings its blocks nearest to so many parameters.

    Raises:
        ConfigError: its other parts alone have more.
    """
    name = "expert_hidden" if cfg.kind == "dyntrm" else "hidden"

    def size(width: int) -> int:
        groups = count_parameters(transformer.spec(replace(cfg, **{name: width}), 1))["groups"]
        return sum(number for group, number in groups.items() if group.startswith("block"))

    if size(1) > parameters:
        raise ConfigError(f"parameters {parameters:,} are too few: a block of kind {cfg.kind} has {size(1):,} at model.{name} 1")
    above = bisect.bisect(range(parameters + 1), parameters, lo=1, key=size)  # the least width that has more
    width = min((above - 1, above), key=lambda width: abs(size(width) - parameters))
    return replace(cfg, **{name: width})


def make_decoder(config: Config, mesh: Mesh) -> Decoder:
    """The model as something that continues sequences, rows split over the devices."""
    cfg = config.model

    @placed(config, mesh)
    def decode(params, cache, *inputs):
        tokens, positions, start, prefix, task, dihedral = _by_rows(mesh, inputs)
        stop = config.eval.entropy_stop
        return transformer.decode(params, cache, tokens, positions, start, prefix, task, dihedral, cfg, stop=stop)

    def init_cache(batch: int, length: int) -> Any:
        return _by_rows(mesh, transformer.init_cache(cfg, batch, length), axis=1)

    return Decoder(init_cache, decode, sharding.row_shards(mesh))


def make_scorer(config: Config, mesh: Mesh) -> Callable[[Any, Batch], Float[Array, "B"]]:
    """The model as something that, with parameters and a batch, gives the log-probability, in nats, of what each sequence is
    trained on; rows split over the devices, which must divide them."""

    @jax.jit
    @placed(config, mesh)
    def score(params: Any, batch: Any) -> Float[Array, "B"]:
        batch = _by_rows(mesh, batch)
        logits = transformer.apply(params, batch, config.model, stop=config.eval.entropy_stop).logits
        loss, _ = token_losses(logits, batch.tokens)
        return -jnp.sum(loss * batch.loss_mask, -1)

    return score


def make_exact(config: Config, mesh: Mesh) -> Callable[[Any, Batch], Bool[Array, "R B"]]:
    """The model as something that, with parameters and a batch, says whether each sequence is `exact` after each recursion; rows
    split over the devices, which must divide them."""

    @jax.jit
    @placed(config, mesh)
    def exact_steps(params: Any, batch: Any) -> Bool[Array, "R B"]:
        batch = _by_rows(mesh, batch)
        return exact(transformer.apply(params, batch, config.model, steps=True, stop=config.eval.entropy_stop).steps, batch)

    return exact_steps


def _by_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Arrays with their rows, along `axis`, split over the devices."""
    split = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *sharding.rows(mesh)))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, split), tree)


def count_parameters(spec: Any) -> dict[str, Any]:
    """Numbers of parameters: `total`, of which `embeddings` and `routers`, and `groups`, by the part of the network."""
    groups: dict[str, int] = {}
    for path, param in jax.tree_util.tree_leaves_with_path(spec, is_leaf=base.is_param):
        words = names(path)
        group = ".".join(words[: 2 if words[0] == "block" else 1])
        groups[group] = groups.get(group, 0) + int(np.prod(param.shape))
    in_routers = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(routers(spec), is_leaf=base.is_param))
    embeddings = sum(groups.get(name, 0) for name in ("embed", "task", "dihedral", "recursion"))
    return {"total": sum(groups.values()), "embeddings": embeddings, "routers": in_routers, "groups": groups}


def routing_snapshot(state: TrainState, metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    """What `routing_latest.npz` holds of every routed layer (of stacked blocks, the last).

    `{layer}.proto [M,D]`, as tokens are matched with them; `{layer}.goodness [M]`, mean over the step's tokens, 0 where the rule
    measures none; `{layer}.load [M]`, each module's share of the slots in that step; `{layer}.usage [M]`, of all slots served so
    far. Every process must call it.
    """
    snapshot: dict[str, np.ndarray] = {}
    for name, layer in layers(state.params).items():
        router, used = effective(jax.tree.map(_fetch, layer.router)), _fetch(state.meta.records[name])
        found = metrics["layers"][name]
        goodness, load = (np.asarray(found.get(what, np.zeros(used.shape))) for what in ("goodness", "load"))
        proto = np.asarray(router.proto)
        proto, used, goodness, load = (a[-1] if proto.ndim == 3 else a for a in (proto, used, goodness, load))
        snapshot |= {f"{name}.proto": proto, f"{name}.goodness": goodness, f"{name}.load": load}
        snapshot[f"{name}.usage"] = used / max(used.sum(), 1)
    return snapshot


def _fetch(x: Any) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))
