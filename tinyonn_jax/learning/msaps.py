"""M-SAPS, memory-surprise-aware prototype shaping: prototypes of calm modules move towards the tokens they serve, those of
surprised ones away; gates learn to predict surprise.

    good: s_m < quantile_a(s), sign −1;   bad: s_m > quantile_{1−a}(s), sign +1     over active modules, a = activation rate
    L_proto = Σ_m sign_m · cos(p_m, anchor_m)          anchor_m = mean of the inputs that activated m in this batch
    L_gate  = mean (x_n·gate_m − S_m)²                 S = DRLN(mu surprise + proto surprise), the Total Surprise; (gate_m − S_m)²
                                                       where gates are no regression, but one number each
    proto update_m *= 1 − protection_m                 the most for the smallest gates (endogenous ranking)
    gradient of p and mu += 2 λ (p, mu)                that of λ (Σ‖p‖² + Σ‖mu‖²), λ = λ0 · mean norm of all p and mu
    dead prototypes start again near the centroid of the living

Letters: N tokens, M modules, D model; a leading axis of recursions or layers. Source: seed 0.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers.routing import EPS, Router, Routing, drln, effective, inverse_norm, per_module, pooled, served
from tinyonn_jax.learning.rule import LearningRule, initial, layers, part, record, replace_part, routers
from tinyonn_jax.learning.signals import NeuronSignals, Signals

BORN = 0.5
"""Activation rate that a new prototype starts with, so that it is not taken for dead before it could show."""


def masked_quantile(values: Float[Array, "*R M"], mask: Bool[Array, "*R M"], q: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """The q-quantile of the values under a mask, linearly interpolated; infinite where the mask is empty."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf), -1)
    at = q * jnp.maximum(jnp.sum(mask, -1) - 1, 0)
    low = jnp.floor(at).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(jnp.sum(mask, -1) - 1, 0))
    a, b = (jnp.take_along_axis(ordered, i[..., None], -1)[..., 0] for i in (low, high))
    return a + jnp.where(high > low, (b - a) * (at - low), 0)


def signs(surprise: Float[Array, "*R M"], active: Bool[Array, "*R M"], rate: Float[Array, "*R"]) -> Float[Array, "*R M"]:
    """−1 good (attract), +1 bad (repel), 0 between or idle. The rate counts up to one half, where good and bad meet."""
    rate = jnp.minimum(rate, 0.5)
    low, high = (masked_quantile(surprise, active, q)[..., None] for q in (rate, 1 - rate))
    return jnp.where(active, (surprise > high).astype(jnp.float32) - (surprise < low), 0.0)


def anchors(routing: Routing) -> tuple[Float[Array, "*R M D"], Float[Array, "*R M"]]:
    """The mean input of the tokens that activated each module, and how many they are."""
    used, count = per_module(routing.active.astype(jnp.float32), routing), served(routing)
    total = jnp.einsum("...nm,...nd->...md", used, routing.input.astype(jnp.float32))
    return stop_gradient(total / jnp.maximum(count, 1)[..., None]), count


def cosine(p: Float[Array, "*R M D"], anchor: Float[Array, "*R M D"]) -> Float[Array, "*R M"]:
    """cos(p_m, anchor_m)."""
    unit = lambda v: v * inverse_norm(v)  # noqa: E731
    return jnp.sum(unit(p) * unit(anchor), -1)


def protection(size: Float[Array, "*L M"], accuracy: Array, temperature: float) -> Float[Array, "*L M"]:
    """How much of each prototype's update is held back, in (0, 1], by the `size` of gates; all of it for the smallest.

    exp((rank − 1) / τ), which where gates differ is softmax(rank / τ) over a layer's modules divided by its largest, so that it
    acts at any number of modules. A rank is the share of modules with a larger gate, so equal gates are protected equally, and
    less than all, or none could begin to move. τ = τ0·(1 − accuracy) falls as the network gets better.
    """
    larger = jnp.sum(size[..., None, :] > size[..., None], -1)
    rank = larger.astype(size.dtype) / max(size.shape[-1] - 1, 1)
    return jnp.exp((rank - 1) / jnp.maximum(temperature * (1 - accuracy), 1e-3))


def gate_size(router: Router) -> Float[Array, "*L M"]:
    """|gate| of each module, or the norm of its row where the gate is a regression."""
    return jnp.linalg.norm(router.gate, axis=-1) if router.gate.ndim == router.proto.ndim else jnp.abs(router.gate)


def shape_layer(router: Router, routing: Routing, signals: Signals | NeuronSignals, attract: bool = True) -> dict[str, Any]:
    """One layer's losses and what they are made of: `proto`, `gate` losses; `sign`, `total` surprise, which where prototypes are
    not to `attract` is that of the modules alone."""
    router = effective(router)
    anchor, count = anchors(routing)
    valid = jnp.maximum(jnp.sum(routing.valid, -1), 1)
    rate = jnp.sum(count, -1) / (valid * count.shape[-1])
    sign = stop_gradient(signs(signals.module_param, count > 0, rate))
    match = cosine(router.proto, anchor)
    norm = jnp.linalg.norm(router.proto, axis=-1) + EPS
    proto_surprise = attract * jnp.abs(sign) * jnp.sqrt(jnp.maximum(1 - match**2, 0)) / norm  # ‖d(sign·cos)/dp‖
    total = stop_gradient(drln(signals.module_param + proto_surprise))
    if routing.config.cost == "linear":
        x = stop_gradient(routing.input.astype(jnp.float32))
        error = jnp.einsum("...nd,...md->...nm", x, router.gate) - total[..., None, :]
        gate = jnp.sum(jnp.where(routing.valid[..., None], error**2, 0)) / (jnp.sum(valid) * error.shape[-1])
    else:
        gate = jnp.mean((router.gate - total) ** 2)
    return {"proto": jnp.sum(sign * match), "gate": gate, "sign": sign, "total": total}


def msaps(
    attract: bool = True,
    regress: bool = True,
    protect: bool = True,
    temperature: float = 0.5,
    l2: float = 1e-4,
    renew: float = 1e-4,
) -> LearningRule:
    """The M-SAPS learning rule, for any routed layer; each of its parts can be switched off.

    `attract` prototype loss; `regress` gate loss; `protect` protection, at `temperature` τ0 (smaller protects fewer modules), of
    which less is left the higher the average of the loss function's metric `main_acc`, all of it if there is none;
    `l2` λ0 of the adaptive decay (0: none), a part of the gradient as in the seed: optimizers that divide by a gradient's size,
    as AdamW and Muon do, shrink what has no other gradient at their own pace, whatever λ0 is; `renew` re-initialises modules
    whose activation rate, a moving average over about 100 steps that starts at `BORN`, is below this while that of another one in
    the layer is not (0: never). The state `MetaState.rule` holds each module's activation rate, by layer.
    """

    def init(params, routings):
        meta = initial(params, routings)
        return replace(meta, rule={name: jnp.full_like(total, BORN) for name, total in meta.records.items()})

    def objective(routers, routings, signals, meta):
        proto, gate, per_layer = jnp.float32(0), jnp.float32(0), {}
        for name, routing in routings.items():
            shaped = shape_layer(routers[name], routing, signals[name], attract)
            proto, gate = proto + shaped["proto"], gate + shaped["gate"]
            rounds = shaped["sign"].size // routers[name].proto[..., 0].size  # recursions that share the router
            found = {"good_share": shaped["sign"] < 0, "bad_share": shaped["sign"] > 0, "idle_share": shaped["sign"] == 0}
            blocks = {f"{share}_by_block": jnp.mean(which, -1) for share, which in found.items() if routers[name].proto.ndim == 3}
            per_layer[name] = blocks | {
                **{share: jnp.mean(which) for share, which in found.items()},
                "goodness": -pooled(shaped["sign"], routers[name].proto[..., 0]) / rounds,
            }
        parts = ({"loss_proto": proto} if attract else {}) | ({"loss_gate": gate} if regress else {})
        return jnp.float32(0) + sum(parts.values()), {**parts, "layers": per_layer}

    def adjust(grads, params, routings, signals, meta):
        if not l2:
            return grads
        decay = l2 * mean_norm(params)
        for name, layer in layers(params).items():
            router, gradient = part(layer, "router"), part(layers(grads)[name], "router")
            modules = jax.tree.map(
                lambda g, w, router=router: g + 2 * decay * w if _is_matrix(w, router) else g,
                part(layers(grads)[name], "modules"),
                part(layer, "modules"),
            )
            grads = replace_part(grads, name, "modules", modules)
            grads = replace_part(grads, name, "router", replace(gradient, proto=gradient.proto + 2 * decay * router.proto))
        return grads

    def restrain(updates, params, routings, signals, meta):
        if not protect:
            return updates
        before = routers(updates)
        for name, router in routers(params).items():
            free = 1 - protection(gate_size(router), meta.accuracy, temperature)
            update = before[name]
            updates = replace_part(updates, name, "router", replace(update, proto=update.proto * free[..., None]))
        return updates

    def update(meta, routings, signals, metrics):
        new = record(meta, routings, signals, metrics)
        rates = {}
        for name, rate in meta.rule.items():
            routing = routings[name]
            now = served(routing) / jnp.maximum(jnp.sum(routing.valid, -1), 1)[..., None]
            rates[name] = 0.99 * rate + 0.01 * (now if now.ndim == rate.ndim else now.mean(0))
        return replace(new, rule=rates)

    def give_birth(params, meta, key):
        dead, rates = {}, {}
        for name, router in routers(params).items():
            rate = meta.rule[name]
            proto, dead[name] = reborn(router.proto, rate < renew, jax.random.fold_in(key, len(rates)))
            params = replace_part(params, name, "router", replace(router, proto=proto))
            rates[name] = jnp.where(dead[name], BORN, rate)
        return params, replace(meta, rule=rates), dead

    return LearningRule(init, objective, adjust, update, restrain, renew=give_birth if renew else None)


def mean_norm(params: Any) -> Array:
    """The mean norm of all prototypes and of all rows of module matrices."""
    norms = []
    for layer in layers(params).values():
        router = part(layer, "router")
        rows = [router.proto, *(w for w in jax.tree.leaves(part(layer, "modules")) if _is_matrix(w, router))]
        norms += [jnp.linalg.norm(row, axis=-1).ravel() for row in rows]
    return jnp.mean(jnp.concatenate(norms)) if norms else jnp.float32(0)


def _is_matrix(w: Array, router: Router) -> bool:
    """Whether each module has rows of it, and not a single number, as of a bias; stacked blocks have one axis more."""
    return w.ndim >= router.proto.ndim


def reborn(proto: Float[Array, "*L M D"], silent: Bool[Array, "*L M"], key: Array) -> tuple[Array, Bool[Array, "*L M"]]:
    """Silent prototypes near the centroid of the living ones, at half the spread of these around it, and which were made anew:
    none where none lives."""
    alive = ~silent[..., None]
    count = jnp.maximum(jnp.sum(alive, -2, keepdims=True), 1)
    centroid = jnp.sum(jnp.where(alive, proto, 0), -2, keepdims=True) / count
    spread = jnp.sqrt(jnp.sum(jnp.where(alive, (proto - centroid) ** 2, 0), (-2, -1), keepdims=True) / (count * proto.shape[-1]))
    fresh = centroid + 0.5 * spread * jax.random.normal(key, proto.shape, proto.dtype)
    dead = silent & jnp.any(~silent, -1, keepdims=True)
    return jnp.where(dead[..., None], fresh, proto), dead
