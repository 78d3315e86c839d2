"""From a configuration to what runs: the loss, the rule, the sharded state, the jitted step, the validation, the decoder.

The one place that knows which parts a `Config` asks for. Letters: B batch, T positions, R recursions, V vocabulary, M modules.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.arc.evaluate import exact
from tinyonn_jax.arc.generate import Decoder
from tinyonn_jax.config import Config
from tinyonn_jax.layers import base
from tinyonn_jax.learning import integrity
from tinyonn_jax.learning.rule import LearningRule, backprop, layers, none, routers
from tinyonn_jax.learning.sars import sars
from tinyonn_jax.models import transformer
from tinyonn_jax.training import sharding
from tinyonn_jax.training.optim import make_optimizer, schedule
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import Aux, LossFn, Step, make_train_step


def make_rule(config: Config) -> LearningRule:
    """The learning rule; a dense model has no routers, and so nothing to teach them."""
    cfg = config.learning
    if config.model.kind == "dense" or cfg.rule == "none":
        return none()
    if cfg.rule == "backprop":
        return backprop(cfg.balance)
    return sars(cfg.granularity, cfg.prior_sign, cfg.goodness_gate)


def cross_entropy(logits: Float[Array, "*R B T V"], batch: Batch) -> Float[Array, "*R"]:
    """Mean cross-entropy in nats of the next tokens that are trained on."""
    targets = jnp.roll(batch.tokens, -1, -1)  # the mask is 0 at the last position
    log_p = jax.nn.log_softmax(logits, -1)
    loss = -jnp.sum(jnp.where(jax.nn.one_hot(targets, logits.shape[-1], dtype=bool), log_p, 0), -1)
    return jnp.sum(loss * batch.loss_mask, (-2, -1)) / jnp.maximum(jnp.sum(batch.loss_mask), 1)


def make_loss(config: Config, isolate: bool) -> LossFn:
    """The loss of a `Batch` under `config.model`, in the form that `make_train_step` takes.

    Deep supervision mixes the mean loss of the earlier recursions, weighted, with that of the last. Metrics: `main_acc` of tokens,
    `exact` of sequences with every output token right, `tau`.
    """
    cfg = config.model

    def loss_fn(params, taps, batch):
        out = transformer.apply(params, batch, cfg, taps, isolate=isolate, steps=cfg.deep_supervision > 0)
        loss = cross_entropy(out.logits, batch)
        if out.steps is not None and cfg.depth > 1:
            earlier = jnp.mean(cross_entropy(out.steps[:-1], batch))
            loss = (loss + cfg.deep_supervision * earlier) / (1 + cfg.deep_supervision)
        logits = jax.lax.stop_gradient(out.logits)
        right = (jnp.argmax(logits, -1) == jnp.roll(batch.tokens, -1, -1)) * batch.loss_mask
        real = batch.length > 0
        metrics = {
            "main_acc": jnp.sum(right) / jnp.maximum(jnp.sum(batch.loss_mask), 1),
            "exact": jnp.sum(exact(logits, batch) & real) / jnp.maximum(jnp.sum(real), 1),
            "tau": integrity.tau(logits, batch.loss_mask),
        }
        return loss, Aux(out.routings, metrics)

    return loss_fn


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


def assemble(config: Config, mesh: Mesh, tasks: int, example: Batch) -> Program:
    """The program of a run with `tasks` tasks; `example` is any batch."""
    rule = make_rule(config)
    loss_fn = make_loss(config, rule.isolate)
    spec = transformer.spec(config.model, tasks)
    tx = make_optimizer(config.optim, config.train.steps, frozen_routers=config.learning.rule == "none")

    def make() -> TrainState:
        params = base.init(jax.random.key(config.train.seed), spec)
        _, shapes = jax.eval_shape(loss_fn, params, None, example)
        return TrainState.create(params, tx, rule.init(params, shapes.routings), config.train.seed)

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
        return new, {**metrics, "lr_main": rate_main(state.step), "lr_meta": rate_meta(state.step)}

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, like), everywhere))


def make_validation(program: Program, batches: Callable[[], Iterable[Batch]]) -> Callable[[TrainState], dict[str, float]]:
    """Measures the average of a state's parameters on `batches()`: loss a token, accuracy of tokens, share of exact sequences."""
    cfg = program.config.model

    @jax.jit
    def sums(params, batch: Batch) -> Array:
        logits = transformer.apply(params, batch, cfg).logits
        count, real = jnp.sum(batch.loss_mask), batch.length > 0
        right = jnp.sum((jnp.argmax(logits, -1) == jnp.roll(batch.tokens, -1, -1)) * batch.loss_mask)
        return jnp.stack([cross_entropy(logits, batch) * count, right, jnp.sum(exact(logits, batch) & real), count, jnp.sum(real)])

    def validate(state: TrainState) -> dict[str, float]:
        parts = [np.asarray(sums(state.ema, program.put(batch)), np.float64) for batch in batches()]
        loss, right, exact_sequences, tokens, sequences = np.sum(parts, 0)
        return {"valid_loss": loss / tokens, "valid_acc": right / tokens, "valid_exact": exact_sequences / sequences}

    return validate


def make_decoder(config: Config, mesh: Mesh) -> Decoder:
    """The model as something that continues sequences, rows split over the devices."""
    cfg = config.model

    def rows(tree: Any, axis: int) -> Any:
        spec = PartitionSpec(*(None,) * axis, sharding.RULES["batch"])
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), tree)

    def decode(params, cache, tokens, positions, start, prefix, task, dihedral):
        inputs = rows((tokens, positions, start, prefix, task, dihedral), 0)
        return transformer.decode(params, cache, *inputs, cfg)

    return Decoder(lambda batch, length: rows(transformer.init_cache(cfg, batch, length), 1), decode)


def count_parameters(spec: Any) -> dict[str, Any]:
    """Numbers of parameters: `total`, `embeddings` and `routers` (both in the total), and `groups`, by the part of the network."""
    groups: dict[str, int] = {}
    for path, param in jax.tree_util.tree_leaves_with_path(spec, is_leaf=base.is_param):
        names = [str(getattr(key, "name", key)) for key in path]
        group = ".".join(names[: 2 if names[0] == "block" else 1])
        groups[group] = groups.get(group, 0) + int(np.prod(param.shape))
    in_routers = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(routers(spec), is_leaf=base.is_param))
    embeddings = sum(groups.get(name, 0) for name in ("embed", "task", "dihedral"))
    return {"total": sum(groups.values()), "embeddings": embeddings, "routers": in_routers, "groups": groups}


def routing_snapshot(state: TrainState, metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    """What `routing_latest.npz` holds: prototypes, mean goodness and lifetime share of use of every routed layer.

    `{layer}.proto [M,D]`, `{layer}.goodness [M]` (0 where the rule measures none), `{layer}.usage [M]`; of stacked blocks the last.
    """
    snapshot: dict[str, np.ndarray] = {}
    for name, layer in layers(state.params).items():
        proto, used = np.asarray(layer.router.proto), np.asarray(state.meta.records[name])
        proto, used = (proto[-1], used[-1]) if proto.ndim == 3 else (proto, used)
        goodness = metrics.get("layers", {}).get(name, {}).get("goodness", np.zeros(len(proto)))
        snapshot |= {f"{name}.proto": proto, f"{name}.goodness": np.asarray(goodness), f"{name}.usage": used / max(used.sum(), 1)}
    return snapshot
