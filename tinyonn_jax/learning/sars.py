"""SARS, surprise-aware routing shaping: the router's prior is its belief shaped by how well its modules served.

    goodness     = DRLN(importance) · (DRLN(logits) − DRLN(cost))      over the modules that compete; 0 for unused ones
    prior_logits = logits ∓ sg(goodness)                               from log p(z) ∝ log p(z|x) − log p(x|z)
    L_meta       = mean over tokens of entropy(prior) + balance · P Σ_m load_m · mean over tokens of prior_m
    prior        = softmax(prior_logits)

Importance and cost are surprise: at granularity `module` the norms of the module's output and parameter gradients over the
batch, at `token` the token's attribution and ghost norm, where it can use several modules. Letters: N tokens, M modules, G groups
of P that compete.
Source: seed 1 §3, seed 4. The seeds have neither `balance` nor `centre`, and there the easiest way down is to give
every token the same modules: tokens have a mean in common, and all prototypes end along it, or against it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from tinyonn_jax.layers.base import entropy
from tinyonn_jax.layers.routing import Routing, drln, per_module, per_slot, pooled, served
from tinyonn_jax.learning.rule import (
    LearningRule,
    by_block,
    initial,
    layers,
    logits_of,
    mean_over_tokens,
    part,
    record,
    replace_part,
)
from tinyonn_jax.learning.signals import NeuronSignals, Signals

Granularity = Literal["module", "token"]
TINY = 1e-12
ROUNDING = 1e-6
"""Surprise below this share of the batch's largest (of neurons, of one recursion's or block's) is no more than the rounding of
what it is the difference of."""


def _competing(values: Float[Array, "*R M"], routing: Routing) -> Float[Array, "*R G P"]:
    return values.reshape(*values.shape[:-1], routing.config.groups, -1)


def goodness(
    routing: Routing, signals: Signals | NeuronSignals, granularity: Granularity, neuron_cost: Granularity = "module"
) -> Float[Array, "*R N S"]:
    """Importance × (belief − cost), each normalised over the modules that compete; 0 for modules not used and for padding,
    carries no gradient.

    A value for every module at granularity module (S = M), for every slot at granularity token (S = K): there a token's other
    modules have none. A module counts as used if the batch used it (module), or if the token did (token). With one slot a group
    it is the module's whatever the granularity. For neurons at granularity token the cost is the module's all the same:
    per token it is |δ|·‖x‖, which normalised over neurons is |δ|, the importance, again.
    """
    belief = drln(_competing(routing.logits, routing))
    if _judged(routing, granularity) == "module":
        importance, cost = signals.module_output[..., None, :], signals.module_param[..., None, :]
        used = (served(routing) > 0)[..., None, :] & routing.valid[..., None]
    else:
        importance, cost, used = signals.attribution, signals.param, routing.active
        belief = _competing(per_slot(belief.reshape(routing.logits.shape), routing), routing)
        if routing.index is None and neuron_cost == "module":
            cost = signals.module_param[..., None, :]
    importance, cost, used = (_competing(v, routing) for v in (importance, cost, used))
    good = jnp.where(used, _relative(importance) * (belief - drln(cost)), 0.0)
    return stop_gradient(good.reshape(*good.shape[:-2], -1))


def _relative(importance: Float[Array, "*R N G S"]) -> Float[Array, "*R N G S"]:
    """DRLN with an ε at which the largest of all rounds: a token that pulls on nothing has but rounding errors to compare."""
    peak = jnp.max(importance, -1, keepdims=True)
    peak = peak + ROUNDING * jnp.max(jnp.squeeze(peak))  # axes of length one would slow a CPU down
    return importance / jnp.where(peak > 0, peak, 1.0)


def _judged(routing: Routing, granularity: Granularity) -> Granularity:
    """By module where a token has one slot in a group: nothing it feels can be compared, and normalised is 1 whatever it was."""
    alone = routing.index is not None and routing.config.slots_per_group == 1
    return "module" if alone else granularity


def _laid(good: Float[Array, "*R N S"], routing: Routing, granularity: Granularity) -> Float[Array, "*R N G P"]:
    """Goodness by module."""
    slots = _judged(routing, granularity) == "token" and routing.index is not None
    return _competing(per_module(good, routing) if slots else good, routing)


def _of_modules(values: Float[Array, "*R N G P"]) -> Float[Array, "*R M"]:
    """Sums over all tokens, by module."""
    total = jnp.sum(values, -3)
    return total.reshape(*total.shape[:-2], -1)


def _share(count: Array, tokens: Array, routing: Routing) -> Array:
    """Of all modules of so many tokens."""
    return count / (jnp.maximum(tokens, 1) * routing.config.modules)


def _mean(values: list[Array]) -> Array:
    return sum(values, jnp.float32(0)) / max(len(values), 1)


def imbalance(chosen: Float[Array, "*L M"], load: Float[Array, "*L M"], per_group: int) -> Float[Array, ""]:
    """P Σ_m load_m p_m, a mean over groups; load: m's share of the slots in use, p: of the mean softmax(prior). 1 when even.

    Both are given as sums over the batch and the recursions that share a router; load has no gradient. A group that nobody uses
    counts as even. Source: Switch Transformers (arXiv 2101.03961), eq. 4-6.
    """
    p, load = (v.reshape(-1, per_group) for v in (chosen, load))
    uneven = per_group * jnp.sum(p * load, -1) / jnp.maximum(jnp.sum(p, -1) * jnp.sum(load, -1), TINY)
    return jnp.mean(jnp.where(jnp.sum(load, -1) > 0, uneven, 1.0))


def centred(logits: Float[Array, "*R N M"], routing: Routing) -> Float[Array, "*R N M"]:
    """The logits, with a gradient that moves no module's mean over the valid tokens: only what tokens differ in is learned.

    That is the gradient less its own mean over tokens, so that prototypes move along inputs less the mean input, and biases not.
    """
    valid = routing.valid[..., None]
    mean = jnp.sum(jnp.where(valid, logits, 0), -2, keepdims=True) / jnp.maximum(jnp.sum(valid, -2, keepdims=True), 1)
    return logits - mean + stop_gradient(mean)


def sars(
    granularity: Granularity = "token",
    prior_sign: Literal["bayes", "reinforce"] = "reinforce",
    goodness_gate: bool = False,
    neuron_cost: Granularity = "module",
    balance: float = 0.0,
    centre: bool = False,
) -> LearningRule:
    """The SARS learning rule.

    `prior_sign`: bayes subtracts goodness, as derived; reinforce adds it, so good modules gain. `goodness_gate`: a module's main
    gradient is applied, and the module moves, only where its mean goodness is positive. `neuron_cost`: see `goodness`. `balance`
    weighs `imbalance`. `centre`: the entropy, not the balance, is of `centred` logits.
    """
    sign = -1.0 if prior_sign == "bayes" else 1.0

    def appraised(routing, signals):
        """Goodness, which is zero for padding, by slot and by module."""
        good = goodness(routing, signals, granularity, neuron_cost)
        return good, _laid(good, routing, granularity)

    def shaped(routing, signals, logits):
        """The entropy of every token's prior `[*R,N]`; and summed over valid tokens, how many modules are good and bad `[*R]`,
        their goodness `[*R,M]`, and the softmax(prior) that balance asks for `[*R,M]`."""
        good, laid = appraised(routing, signals)
        prior = _competing(logits, routing) + sign * laid
        learned = _competing(centred(logits, routing), routing) + sign * laid if centre else prior
        chosen = jnp.where(routing.valid[..., None, None], jax.nn.softmax(prior), 0)
        # Of numbers made once: comparisons on the way into a sum are slow on CPUs.
        verdict = jnp.where(good > 0, 1.0, jnp.where(good < 0, -1.0, jnp.zeros_like(good)))
        more, either = jnp.sum(verdict, (-2, -1)), jnp.sum(jnp.abs(verdict), (-2, -1))
        return entropy(learned).mean(-1), (either + more) / 2, (either - more) / 2, _of_modules(laid), _of_modules(chosen)

    def objective(routers, routings, signals, meta):
        losses, shares, uneven, per_layer = [], [], [], {}
        for name, routing in routings.items():
            like = routers[name].proto[..., 0]
            uncertainty, good, bad, total, chosen = by_block(shaped, routing, signals[name], logits_of(routers[name], routing))
            losses.append(mean_over_tokens(uncertainty, routing))
            shares.append(losses[-1] / jnp.log(max(routing.config.per_group, 2)))
            if balance:
                uneven.append(imbalance(pooled(chosen, like), pooled(served(routing), like), routing.config.per_group))
            tokens = jnp.sum(routing.valid, -1)
            found = {}
            for share, count in (("good_share", good), ("bad_share", bad)):
                found[share] = _share(jnp.sum(count), jnp.sum(tokens), routing)
                if like.ndim == 2:  # blocks with modules of their own
                    found[f"{share}_by_block"] = _share(count, tokens, routing)
            per_layer[name] = found | {
                "idle_share": 1 - found["good_share"] - found["bad_share"],
                "goodness": pooled(total, like) / jnp.maximum(pooled(tokens[..., None], like), 1),
            }
        found = {"entropy_share": _mean(shares), "layers": per_layer} | ({"loss_balance": _mean(uneven)} if balance else {})
        return _mean(losses) + balance * _mean(uneven), found

    def adjust(grads, params, routings, signals, meta):
        if not goodness_gate:
            return grads
        for name, layer in layers(grads).items():
            total = by_block(lambda *block: _of_modules(appraised(*block)[1]), routings[name], signals[name])
            good = pooled(total, part(layer, "router").proto[..., 0]) > 0
            grads = replace_part(grads, name, "modules", gate(part(layer, "modules"), good))
        return grads

    # Of updates too, or the optimizers' momentum would move a module whose gradient is zero.
    return LearningRule(initial, objective, adjust, record, restrain=adjust)


def gate(modules: Array, keep: Array) -> Array:
    """Zeroes the gradients of modules that `keep [M]` (or `[L,M]`) rules out; `modules` is any tree with that leading axis."""
    return jax.tree.map(lambda g: g * keep.reshape(*keep.shape, *(1,) * (g.ndim - keep.ndim)).astype(g.dtype), modules)
