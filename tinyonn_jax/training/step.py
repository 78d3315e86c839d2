"""The train step: one backward pass gives the main gradients and every surprise signal; surprise teaches the routers.

    (loss, aux), (grads, tapped) = value_and_grad(loss_fn, (0, 1), has_aux=True)(params, taps, batch)
    signals                      = read(tapped)
    grads of routers            += grad of rule.objective(routers, routings, signals)
    updates                      = optax.multi_transform(main, meta)

A step whose loss or gradient is not finite changes nothing but the count of skipped steps.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tinyonn_jax.layers.routing import Routing, load
from tinyonn_jax.layers.tap import Taps, noted
from tinyonn_jax.learning import signals as surprise
from tinyonn_jax.learning import variational
from tinyonn_jax.learning.integrity import predictive_integrity
from tinyonn_jax.learning.rule import LearningRule, MetaState, layers, replace_part, routers, without_routers
from tinyonn_jax.training.optim import names
from tinyonn_jax.training.state import TrainState


@flax.struct.dataclass
class Aux:
    """What a loss function returns besides the loss: a `Routing` for each routed layer, by its dotted path, and metrics.

    The routing of a layer that is applied R times is that of all its calls, stacked along a leading axis R; its tap then has that
    axis too, and call i takes `jax.tree.map(lambda t: t[i], taps[name])`, as a scan over the taps does by itself. Of the metrics
    `main_acc` and `tau` (see `learning.integrity`) are made use of; names that the step itself measures are refused.
    """

    routings: dict[str, Routing]
    metrics: dict[str, Array]


LossFn = Callable[[Any, Taps | None, Any], tuple[Array, Aux]]
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
T = TypeVar("T")


def _shapes(loss_fn: LossFn, params: Any, batch: Any) -> Aux:
    """What the loss function returns besides the loss, as shapes.

    Raises:
        TypeError: it returned something else.
    """
    returned = jax.eval_shape(loss_fn, params, None, batch)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Aux)):
        raise TypeError(f"loss_fn must return (loss, Aux(routings, metrics)), not {type(returned).__name__}")
    return returned[1]


def init_state(
    loss_fn: LossFn, rule: LearningRule, tx: optax.GradientTransformation, params: Any, batch: Any, seed: int = 0
) -> TrainState:
    """The state before the first step: what the rule remembers is as large as the routed layers that `loss_fn` meets.

    `batch` is any batch, or what `jax.eval_shape` tells of one; of params, copies are kept (see `TrainState.create`).

    Raises:
        TypeError: the loss function returned something else than (loss, Aux).
        ValueError: the names of its routings are not those of the routed layers in `params`.
    """
    return TrainState.create(params, tx, rule.init(params, _shapes(loss_fn, params, batch).routings), seed)


def gradients(loss_fn: LossFn, rule: LearningRule, params: Any, meta: MetaState, batch: Any):
    """Gradients of one batch: main for modules, meta (plus main, for rules without isolation) for routers.

    Returns (grads, routings, signals, metrics).

    Raises:
        TypeError: the loss function returned something else.
        ValueError: the names of the routings are not those of the routed layers in `params`; or a router is cut off from the main
            loss where the rule needs it, or the other way round; or the loss function's metrics have names of the step's own.

    Warns:
        UserWarning: no gradient reaches the tap of some layer, most likely because the loss function does not hand it on.
    """
    shapes = _shapes(loss_fn, params, batch)
    if set(shapes.routings) != set(layers(params)):
        raise ValueError(
            f"loss_fn returned routings {sorted(shapes.routings)}, but the routed layers are {sorted(layers(params))}"
        )
    for name, routing in shapes.routings.items():
        if routing.config.isolate != rule.isolate:
            what = "isolates its router from the main loss" if routing.config.isolate else "lets the main loss reach its router"
            raise ValueError(f"layer {name!r} {what}, which this rule does not: give it RouterConfig(…, isolate={rule.isolate})")
    taps = surprise.make_taps(shapes.routings)
    reached: set[str] = set()
    tapped_loss = lambda params, taps: loss_fn(params, noted(taps, reached), batch)  # noqa: E731
    (loss, aux), (grads, tapped) = jax.value_and_grad(tapped_loss, (0, 1), has_aux=True)(params, taps)
    for name in sorted(set(taps) - reached):
        warnings.warn(
            f"no gradient reaches the tap of layer {name!r}: its surprise is zero. Is taps[{name!r}] handed on?", stacklevel=2
        )
    # Many ask for the load: behind a barrier, or XLA goes through all slots again for each sum over modules.
    loads = jax.lax.optimization_barrier({name: load(routing) for name, routing in aux.routings.items()})
    routings = {name: replace(routing, load=loads[name]) for name, routing in aux.routings.items()}
    signals = surprise.read(tapped, routings)

    objective = jax.value_and_grad(rule.objective, has_aux=True)
    (meta_loss, rule_metrics), meta_grads = objective(routers(params), routings, signals, meta)
    for name, router in routers(grads).items():
        grads = replace_part(grads, name, "router", jax.tree.map(jnp.add, router, meta_grads[name]))
    grads = rule.adjust(grads, params, routings, signals, meta)

    metrics = {
        "main_loss": loss,
        "meta_loss": meta_loss,
        **_routing_metrics(params, routings, signals, rule_metrics, meta),
    }
    if routings:
        metrics["elbo"] = -loss - sum(layer["kl"] for layer in metrics["layers"].values())
    return grads, routings, signals, _joined(aux.metrics, metrics)


def _joined(metrics: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A loss function's metrics and the step's own.

    Raises:
        ValueError: names of both.
    """
    if taken := sorted(metrics.keys() & own):
        raise ValueError(f"metrics {taken} of the loss function have names of the train step's own: rename them")
    return metrics | own


def _routing_metrics(params: Any, routings: Any, signals: Any, rule_metrics: Any, meta: MetaState) -> dict[str, Any]:
    """Per layer under `layers`, and their averages at the top."""
    rule_metrics = dict(rule_metrics)
    per_layer = rule_metrics.pop("layers", {})
    found = {
        name: {
            **surprise.summary(routing, signals[name], meta.records[name]),
            **_divergence(routing, meta.prior[name]),
            "gate_mean": jnp.mean(routers(params)[name].gate),
            "gate_std": jnp.std(routers(params)[name].gate),
            "gate_max": jnp.max(routers(params)[name].gate),
            **per_layer.get(name, {}),
        }
        for name, routing in routings.items()
    }
    if not found:
        return rule_metrics
    return {**rule_metrics, **surprise.averages(list(found.values())), "layers": found}


def _divergence(routing: Routing, prior: Array) -> dict[str, Array]:
    """Of stacked blocks the sum, and each block's."""
    kl = variational.divergence(variational.posterior(routing, prior), prior)
    return {"kl": jnp.sum(kl)} | ({"kl_by_block": kl} if kl.ndim else {})


def _renewed(renew: Callable, state: TrainState) -> TrainState:
    """The state after a rule made prototypes anew: these rows lose their optimizer moments, and their average starts again."""
    params, meta, fresh = renew(state.params, state.meta, jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))
    # A leaf belongs to the longest of the names that end its path: "x.q" ends with "q" too, which is another layer.
    places = sorted((([*filter(None, name.split(".")), "router", "proto"], name) for name in fresh), key=lambda p: -len(p[0]))
    shapes = {name: router.proto.shape for name, router in routers(params).items()}

    def reset(path, leaf, value=0.0):
        words = names(path)
        name = next((name for place, name in places if words[-len(place) :] == place), None)
        if name is None or leaf.shape != shapes[name]:  # an optimizer may keep something of another shape
            return leaf
        return jnp.where(fresh[name][..., None], value, leaf)

    opt_state = jax.tree_util.tree_map_with_path(reset, state.opt_state)
    ema = jax.tree_util.tree_map_with_path(reset, state.ema, params)
    return replace(state, params=params, meta=meta, opt_state=opt_state, ema=ema)


def _norm(grads: Any) -> Array:
    """Global norm of a tree that may be empty."""
    return optax.tree.norm(grads) if jax.tree.leaves(grads) else jnp.float32(0)


def _either(condition: Array, then: Callable[[], T], other: Callable[[], T]) -> T:
    """What one of two functions returns. A CPU by itself runs that one alone: there the program is cut, and averages read the new
    parameters, not their updates. Others run both: a GPU's host would have to wait, and many devices to talk in a branch."""
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        return jax.lax.cond(condition, then, other)
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then(), other())


def make_train_step(
    loss_fn: LossFn,
    rule: LearningRule,
    tx: optax.GradientTransformation,
    ema: float = 0.0,
    pi: tuple[float, float] = (0.1, 1.0),
) -> Step:
    """The step `(state, batch) -> (state, metrics)`, jitted, with the state donated.

    `loss_fn(params, taps, batch) -> (loss, Aux)`; `taps` is None or a dict to hand to the layers, by the same names as the
    routings. `ema` is the decay of the parameters' moving average (0: the parameters themselves); `pi` the α and γ of predictive
    integrity, which is reported where the loss function reports `tau`. The optimizer is told `value`, the loss, too; one that
    searches along a line, as lbfgs, would need the loss function, and goes without (`linesearch=None`).

    Raises:
        TypeError: the rule is not one.
    """
    if not isinstance(rule, LearningRule):
        raise TypeError(f"rule must be a LearningRule, as sars() makes one, not {rule!r}")
    optimizer = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        grads, routings, signals, metrics = gradients(loss_fn, rule, state.params, state.meta, batch)
        # Each summed by itself: a difference of two sums would drown a small norm in the rounding of a large one.
        norms = {"main": _norm(without_routers(grads)), "meta": _norm(routers(grads))}
        finite = jnp.all(jnp.isfinite(jnp.stack([metrics["main_loss"], *norms.values()])))

        def learned() -> TrainState:
            told = {"norms": norms, "value": metrics["main_loss"]}  # what some optimizers ask for
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **told)
            updates = rule.restrain(updates, state.params, routings, signals, state.meta)
            params = optax.apply_updates(state.params, updates)
            # A short memory at first, as there is little to remember.
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            new = replace(
                state,
                step=state.step + 1,
                params=params,
                opt_state=opt_state,
                meta=rule.update(state.meta, routings, signals, metrics),
                ema=jax.tree.map(lambda old, p: decay * old + (1 - decay) * p, state.ema, params),
                skipped=jnp.int32(0),
            )
            return new if rule.renew is None else _renewed(rule.renew, new)

        def skipped() -> TrainState:
            return replace(state, step=state.step + 1, skipped=state.skipped + 1, skipped_total=state.skipped_total + 1)

        new = _either(finite, learned, skipped)
        own = {
            **{f"grad_norm_{group}": norm for group, norm in norms.items()},
            "ema_acc": new.meta.accuracy,
            "skipped": new.skipped,
            "skipped_total": new.skipped_total,
        }
        if "tau" in metrics:
            own["pi"] = predictive_integrity(metrics["main_loss"], metrics["tau"], metrics.get("surprise_output", 0.0), *pi)
        return new, _joined(metrics, own)

    return jax.jit(step, donate_argnums=0)
