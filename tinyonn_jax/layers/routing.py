"""Routing: match, cost, select. A token is matched with every module's prototype, the module's cost is taken off, and the
logits decide which modules the token uses and with what weight. Every dynamic layer routes through this file.

Letters: N tokens, D model, M modules, K slots per token, G groups of modules that compete among themselves.
Source: seed 0 (proposer-builder, DRLN), seed 1 (CAPR, top-k), seed 2 (top-any), seed 4 (hard gating, isolation).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.layers.base import Param, fan_in, layer_norm, normal, ones, wrong_choices, zeros
from tinyonn_jax.layers.layout import each_token

EPS = 1e-6


@dataclass(frozen=True)
class RouterConfig:
    """How one router decides.

    `modules` M; `groups` G: the modules fall into G equal runs, and selection happens within each;
    `slots`: modules per token and group, exactly (top_k) or at most (relu, hard, threshold); 0: all of the group's, M/G;
    `match`, `cost`, `select`: see the functions of these names; `weight`: of the slots, under top_k alone;
    `fallback`: modules that a token takes when none is above zero, under threshold alone;
    `isolate`: the main loss teaches modules only, never the router (seed 4).

    Raises:
        ValueError: groups do not divide modules, a number is too small, or a choice is not one of those named.
    """

    modules: int
    slots: int
    groups: int = 1
    match: Literal["cosine", "dot"] = "cosine"
    cost: Literal["bias", "bias_drln", "linear", "threshold"] = "bias"
    select: Literal["top_k", "relu", "hard", "threshold"] = "top_k"
    weight: Literal["softmax", "relu", "hard"] = "softmax"
    fallback: int = 1
    isolate: bool = True

    def __post_init__(self):
        if self.modules < 1 or self.groups < 1 or self.slots < 0 or self.fallback < 0:
            raise ValueError(f"modules and groups must be at least 1, slots and fallback at least 0; got {self}")
        if self.modules % self.groups:
            raise ValueError(f"groups must divide modules; got {self.modules} modules in {self.groups} groups")
        for wrong in wrong_choices(self):
            raise ValueError(wrong)

    @property
    def per_group(self) -> int:
        """Modules in one group, M / G."""
        return self.modules // self.groups

    @property
    def slots_per_group(self) -> int:
        """Slots in one group; the K of `Routing` is G times this."""
        return self.slots or self.per_group


@flax.struct.dataclass
class Stream:
    """A prototype residual connection (PRC) into one layer: `w [D,D]`, and the `scale [D]` and `bias [D]` of its layer norm."""

    w: Any
    scale: Any
    bias: Any


@flax.struct.dataclass
class Router:
    """Router parameters: prototypes `proto [M, D]`, cost `gate [M]`, or `[M, D]` with cost linear.

    `stream`: in a stack of L blocks with prototype residual connections, the L-1 of them; see `effective`.
    """

    proto: Any
    gate: Any
    stream: Stream | None = None


@flax.struct.dataclass
class Load:
    """How much each module is used: `count` tokens use it, and give it `weight` in all. Data, without gradient."""

    count: Float[Array, "*R M"]
    weight: Float[Array, "*R M"]


@flax.struct.dataclass
class Routing:
    """What a router decided for N tokens, as data apart from the modules.

    Slots are ordered by group, then by falling logit; `index` None says that every module has a slot of its own, in order
    (K = M), as neurons do. `active` marks the slots in use: selections with a variable number of modules leave some slots idle,
    with weight 0, and tokens that are not `valid` (padding) leave all of them idle. `unrouted`
    marks the valid tokens that had no module above zero (in some group) where the selection asks for one. `config` says how
    the decision was made, so that a learning rule can make the logits again from `input`. `dropped` marks the slots in use that
    go without their module, because too many tokens were sent to its device; None where that cannot be (see `layers.parallel`).
    `load` is there where every module has a slot of its own, for sums over as many slots as outputs are best taken on the spot;
    and of what a train step hands to its rule.
    """

    logits: Float[Array, "*R N M"]
    index: Int[Array, "*R N K"] | None
    weight: Float[Array, "*R N K"]
    active: Bool[Array, "*R N K"]
    input: Float[Array, "*R N D"]
    valid: Bool[Array, "*R N"]
    unrouted: Bool[Array, "*R N"]
    config: RouterConfig = flax.struct.field(pytree_node=False)
    dropped: Bool[Array, "*R N K"] | None = None
    load: Load | None = None

    @property
    def slots(self) -> Int[Array, "*R N K"]:
        """`index`, also where every module has a slot of its own."""
        return jnp.broadcast_to(jnp.arange(self.weight.shape[-1]), self.weight.shape) if self.index is None else self.index


def stream_spec(dim: int) -> Stream:
    """W normal with variance 1 / fan-in; the norm's scale starts at 0.02, the size of a prototype's entries."""
    return Stream(
        w=Param((dim, dim), (None, "embed"), fan_in),
        scale=Param((dim,), ("embed",), lambda key, shape: 0.02 * ones(key, shape)),
        bias=Param((dim,), ("embed",), zeros),
    )


def effective(router: Router) -> Router:
    """The routers `[L,…]` of a stack with their prototype residual connections applied (seed 0): each layer's prototypes are
    refined from those of the layer before, p_eff^l = proto^l + LayerNorm(p_eff^{l-1}·W^l). Without any, the router as it is."""
    if router.stream is None:
        return router
    first, *others = jnp.unstack(router.proto)
    refined = [first]
    streams = zip(*(jnp.unstack(leaf) for leaf in (router.stream.w, router.stream.scale, router.stream.bias)), strict=True)
    for proto, (w, scale, bias) in zip(others, streams, strict=True):
        refined.append(proto + layer_norm(refined[-1] @ w, scale, bias))
    return Router(jnp.stack(refined), router.gate)


def spec(dim: int, cfg: RouterConfig) -> Router:
    """Prototypes from N(0, 0.02²), gates zero.

    Raises:
        ValueError: more slots in a group than it has modules.
    """
    if cfg.slots_per_group > cfg.per_group:
        raise ValueError(f"slots ({cfg.slots}) must not exceed the modules of a group ({cfg.per_group})")
    gate = ((cfg.modules, dim), ("modules", "embed")) if cfg.cost == "linear" else ((cfg.modules,), ("modules",))
    return Router(proto=Param((cfg.modules, dim), ("modules", "embed"), normal(0.02)), gate=Param(*gate, zeros))


def drln(v: Float[Array, "..."], axis: int = -1, floor: float = 0.0) -> Float[Array, "..."]:
    """Dynamic relative linear normalisation, v / (max|v| + floor) along `axis` (seed 0): linear, in [-1, 1], keeps ratios.

    The maximum carries no gradient; an all-zero input gives zero, with gradient 1 or 1 / floor.
    """
    highest, lowest = (extreme(jax.lax.stop_gradient(v), axis, keepdims=True) for extreme in (jnp.max, jnp.min))
    peak = jnp.maximum(highest, -lowest)  # of |v|, which is not made
    if floor:
        return v / (peak + floor)
    ratio = v / jnp.where(peak > 0, peak, 1.0)
    # Compiled, the division may be a product with a rounded reciprocal: the largest is made exactly one, so that two cancel.
    return ratio + jax.lax.stop_gradient(jnp.where(jnp.abs(v) == peak, jnp.sign(v) - ratio, 0))


_exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)  # GPUs and TPUs would round float32 factors


def inverse_norm(v: Float[Array, "*N D"]) -> Float[Array, "*N 1"]:
    """1 / ‖v‖; 1 / ε for a zero vector, so that it matches nothing, and its gradient is finite."""
    return jax.lax.rsqrt(jnp.sum(v * v, -1, keepdims=True) + EPS**2)


def match(x: Float[Array, "N D"], proto: Float[Array, "M D"], cfg: RouterConfig) -> Float[Array, "N M"]:
    """Cosine similarity x·p / (‖x‖‖p‖), or dot product x·p / √D (seeds 0 and 1)."""
    if cfg.match == "dot":
        return _exact(x, proto.T) * x.shape[-1] ** -0.5
    # Tokens are many: it is their M products that are divided by their norms, not their D entries.
    return _exact(x, (proto * inverse_norm(proto)).T) * inverse_norm(x)


def cost(x: Float[Array, "N D"], gate: Array, cfg: RouterConfig) -> Array:
    """The price of every module, [M] or [N, M]: g, g / (max|g| + 1), the regression x·gᵀ (seed 0), or sigmoid(g) (seed 2).

    The 1 is DRLN's ε: with a tiny one, the first step away from zero makes every price +-1 and decides every neuron for good.
    """
    match cfg.cost:
        case "bias":
            return gate
        case "bias_drln":
            return drln(gate, floor=1.0)
        case "linear":
            return _exact(x, gate.T)
        case "threshold":
            return jax.nn.sigmoid(gate)


def routing_logits(router: Router, x: Float[Array, "N D"], cfg: RouterConfig) -> Float[Array, "N M"]:
    """logits = match − cost, in float32: the proposer's offer above the builder's price."""
    x = x.astype(jnp.float32)
    return match(x, router.proto, cfg) - cost(x, router.gate, cfg)


def weighing(select: str, weight: str) -> str:
    """How selected modules are weighed, softmax, relu or hard: chosen under top_k, else what belongs to the selection."""
    return weight if select == "top_k" else {"relu": "relu", "hard": "hard", "threshold": "softmax"}[select]


ROUNDS = 8
"""Up to so many slots a GPU finds by one maximum after the other; for more it sorts."""


def _largest(v: Float[Array, "*N P"], k: int) -> Int[Array, "*N k"]:
    """Where the k largest are, falling; the first of equals first."""
    by_sort = lambda v: jax.lax.top_k(v, k)[1]  # noqa: E731
    if k > ROUNDS:
        return by_sort(v)
    by_rounds = partial(_largest_by_rounds, k=k)
    return jax.lax.platform_dependent(v, cuda=by_rounds, rocm=by_rounds, default=by_sort)


def _largest_by_rounds(v: Float[Array, "*N P"], k: int) -> Int[Array, "*N k"]:
    v, found, lane = jnp.maximum(v, jnp.finfo(v.dtype).min), [], jnp.arange(v.shape[-1])
    for _ in range(k):
        found.append(jnp.argmax(v, -1))
        v = jnp.where(lane == found[-1][..., None], -jnp.inf, v)
    return jnp.stack(found, -1).astype(jnp.int32)


def select(logits: Float[Array, "N M"], cfg: RouterConfig) -> tuple[Array, Array, Array, Array]:
    """Which modules, with what weight: index, weight, active `[N, K]`, and unrouted `[N]`.

    top_k: the k largest, weighted by softmax over them, by one, or by their positive part, which leaves out those that have
    none. relu: logit > 0, weight = logit.
    hard: logit > 0, weight 1, no straight-through estimator. threshold: logit > 0, weight = softmax over those; a token with
    none takes its best `fallback`.
    """
    n, k = logits.shape[0], cfg.slots_per_group
    logits = logits.reshape(n, cfg.groups, cfg.per_group)
    # Named, so that a rematerialised block keeps the decision instead of making it again; weights and their gradients follow it.
    index = checkpoint_name(each_token(partial(_largest, k=k), jax.lax.stop_gradient(logits)), "routing")  # [N,G,k]
    value = jnp.sum(jnp.where(index[..., None] == jnp.arange(cfg.per_group), logits[..., None, :], 0), -1)
    above = checkpoint_name(value > 0, "routing")
    none = ~above[..., :1]
    match cfg.select:
        case "top_k":
            active = above if cfg.weight == "relu" else jnp.ones_like(above)  # a weight of zero is no use of a module
        case "relu" | "hard":
            active = above
        case "threshold":
            active = above | (none & (jnp.arange(k) < cfg.fallback))
    match weighing(cfg.select, cfg.weight):
        case "softmax":
            lowest = jnp.finfo(jnp.float32).min  # not -inf: a token may have no active slot at all (fallback 0)
            weight = jnp.where(active, jax.nn.softmax(jnp.where(active, value, lowest), -1), 0)
        case "relu":
            weight = jax.nn.relu(value)
        case _:
            weight = active.astype(jnp.float32)
    index = index + cfg.per_group * jnp.arange(cfg.groups)[:, None]
    always = cfg.select == "top_k" and cfg.weight != "relu"
    unrouted = jnp.zeros((n,), bool) if always else jnp.any(none, (1, 2))
    return index.reshape(n, -1), weight.reshape(n, -1), active.reshape(n, -1), unrouted


def _decide_by(router: Router, x: Float[Array, "N D"], cfg: RouterConfig) -> Float[Array, "N M"]:
    """The logits, cut from the main loss with `cfg.isolate`."""
    if router.proto.shape[-2] != cfg.modules:
        raise ValueError(f"params have a router of {router.proto.shape[-2]} modules, the config one of {cfg.modules}")
    logits = routing_logits(router, x, cfg)
    return jax.lax.stop_gradient(logits) if cfg.isolate else logits


def route(router: Router, x: Float[Array, "N D"], cfg: RouterConfig, valid: Bool[Array, " N"] | None = None) -> Routing:
    """Match, cost, select. With `cfg.isolate` the decision is cut from the main loss, towards the router and towards x."""
    valid = jnp.ones(x.shape[0], bool) if valid is None else valid.astype(bool)
    logits = _decide_by(router, x, cfg)
    index, weight, active, unrouted = checkpoint_name(select(logits, cfg), "routing")
    active = active & valid[:, None]
    return Routing(logits, index, jnp.where(active, weight, 0), active, jax.lax.stop_gradient(x), valid, unrouted & valid, cfg)


def data_init(router: Router, routing: Routing, key: Array) -> Router:
    """The router with the inputs of random valid tokens as prototypes, so that every module starts near some of the data.

    No two are equal while there are other inputs: of modules with equal prototypes the first would win every token. `routing` is
    one that this router made; with blocks of their own both have a leading axis L, and prototype residual
    connections refine them after.
    """

    def one(key, proto, x, valid):
        mark, draw = jax.random.split(key)
        along = _exact(x, jax.random.normal(mark, x.shape[1:]))  # equal inputs are neighbours here, but for rounding
        order = jnp.argsort(jnp.where(valid, along, jnp.inf))
        met = jnp.diff(along[order], prepend=-jnp.inf) <= 1e-5 * jnp.max(jnp.abs(along))
        drawn = jax.random.gumbel(draw, along.shape) - jnp.where(met, 1e3, 0)
        falling = order[jnp.argsort(jnp.where(valid[order], -drawn, jnp.inf))]
        return x[falling[jnp.arange(proto.shape[0]) % jnp.sum(valid)]].astype(proto.dtype)

    if router.proto.ndim == 3:
        keys = jax.random.split(key, router.proto.shape[0])
        return replace(router, proto=jax.vmap(one)(keys, router.proto, routing.input, routing.valid))
    x, valid = routing.input.reshape(-1, routing.input.shape[-1]), routing.valid.reshape(-1)  # of all recursions
    return replace(router, proto=one(key, router.proto, x, valid))


def _among_best(logits: Float[Array, "N M"], cfg: RouterConfig) -> Bool[Array, "N M"] | bool:
    """Whether a module's logit is one of the k largest of its group, the first of equals first."""
    if cfg.slots_per_group == cfg.per_group:
        return True
    by_group = jax.lax.stop_gradient(logits).reshape(-1, cfg.groups, cfg.per_group)
    last = each_token(lambda v: [best[..., -1:] for best in jax.lax.top_k(v, cfg.slots_per_group)], by_group)
    before = (by_group > last[0]) | ((by_group == last[0]) & (jnp.arange(cfg.per_group) <= last[1]))
    return before.reshape(logits.shape)


def route_all(router: Router, x: Float[Array, "N D"], cfg: RouterConfig, valid: Bool[Array, " N"] | None = None) -> Routing:
    """`route` where every module is a candidate and keeps its place: no sort, `index` None. For selections relu and hard.

    With `cfg.slots`, at most so many of a group are active: the best of those above zero.

    Raises:
        ValueError: another selection.
    """
    if cfg.select not in ("relu", "hard"):
        raise ValueError(f"neurons are selected by relu or hard, not by {cfg.select}")
    valid = jnp.ones(x.shape[0], bool) if valid is None else valid.astype(bool)
    logits = _decide_by(router, x, cfg)
    active = checkpoint_name((logits > 0) & _among_best(logits, cfg), "routing") & valid[:, None]
    weight = jnp.where(active, logits if cfg.select == "relu" else 1.0, 0.0)
    data = jax.lax.stop_gradient(weight)
    total = jnp.sum(data, 0)
    count = total if cfg.select == "hard" else jnp.sum(active.astype(jnp.float32), 0)
    of_groups = jnp.sum(data.reshape(-1, cfg.groups, cfg.per_group), -1)  # weights are positive where active
    unrouted = valid & jnp.any(of_groups == 0, -1)
    return Routing(logits, None, weight, active, jax.lax.stop_gradient(x), valid, unrouted, cfg, load=Load(count, total))


def part(routing: Routing, first: Int[Array, ""], modules: int) -> Routing:
    """The routing as the owner of the modules first … first + modules - 1 sees it: counted from `first`, other slots idle."""
    index = routing.slots - first
    active = routing.active & (index >= 0) & (index < modules)
    return replace(
        routing,
        logits=jax.lax.dynamic_slice_in_dim(routing.logits, first, modules, -1),
        index=index,
        weight=jnp.where(active, routing.weight, 0),
        active=active,
        config=replace(routing.config, modules=modules, groups=1, slots=index.shape[-1]),
    )


def given(index: Int[Array, "N K"], active: Bool[Array, "N K"], modules: int) -> Routing:
    """A routing decided elsewhere, of which only the slots are known; active ones have weight one."""
    n, slots = index.shape
    none = jnp.zeros((n, modules), jnp.float32)
    weight, valid = active.astype(jnp.float32), jnp.any(active, -1)
    return Routing(none, index, weight, active, none[:, :0], valid, jnp.zeros_like(valid), RouterConfig(modules, slots))


def held(routing: Routing) -> Bool[Array, "*R N G k P"]:
    """Which of its group's modules each slot holds, none if idle. Comparisons: scatters and gathers would not shard."""
    cfg, index = routing.config, routing.slots
    by_group = lambda v: v.reshape(*index.shape[:-1], cfg.groups, -1, 1)  # noqa: E731
    within = by_group(index) - cfg.per_group * jnp.arange(cfg.groups)[:, None, None]
    return (within == jnp.arange(cfg.per_group)) & by_group(routing.active)


def per_module(values: Float[Array, "*R N K"], routing: Routing) -> Float[Array, "*R N M"]:
    """Slot values laid out by module, zero where a token does not use the module."""
    if routing.index is None:
        return jnp.where(routing.active, values, 0)
    hit = held(routing)
    by_slot = jnp.where(hit, values.reshape(*hit.shape[:-1], 1), 0)
    each = (by_slot[..., slot, :] for slot in range(hit.shape[-2]))
    return sum(each, jnp.zeros((), values.dtype)).reshape(routing.logits.shape)


def per_slot(values: Float[Array, "*R N M"], routing: Routing) -> Float[Array, "*R N K"]:
    """Module values laid out by slot, zero in idle slots."""
    if routing.index is None:
        return jnp.where(routing.active, values, 0)
    hit = held(routing)
    by_group = values.reshape(*hit.shape[:-2], -1)
    each = [jnp.sum(jnp.where(hit[..., slot, :], by_group, 0), -1) for slot in range(hit.shape[-2])]
    return jnp.stack(each, -1).reshape(routing.weight.shape)


def pooled(values: Float[Array, "*R M"], like: Float[Array, "*L M"]) -> Float[Array, "*L M"]:
    """Values of modules, summed over recursions where all of them share one router; blocks with their own stay apart."""
    return values if values.ndim == like.ndim else values.sum(0)


def totals(values: Float[Array, "*R N K"], routing: Routing) -> Float[Array, "*R M"]:
    """Slot values, which must be zero in idle slots, summed over tokens, by module."""
    return jnp.sum(values if routing.index is None else per_module(values, routing), -2)


def load(routing: Routing) -> Load:
    """How much each module is used."""
    if routing.load is not None:
        return routing.load
    return Load(totals(routing.active.astype(jnp.float32), routing), totals(routing.weight, routing))


def served(routing: Routing) -> Float[Array, "*R M"]:
    """How many tokens use each module."""
    return load(routing).count
