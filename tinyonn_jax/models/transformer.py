"""The network: embed, apply a block `depth` times, read out. One code path; the kind decides the block's parts.

    x = token + task + dihedral embeddings;  e0 = x
    each recursion r:  x += e0 (inject, r > 0) + e_r (recursion embedding)
                       x += attention(conv(norm(x)));  x += feedforward(conv(norm(x)))     (conv: short convolution, if wanted)
    logits = norm(x) · head

Recursed (DynTRM): one set of parameters, scanned R times, one Routing per recursion. Stacked: the same scan over parameters
with a leading axis L. Letters: B batch, T positions, D model, R recursions or layers, V vocabulary. Source: seed 1 §4; recursion
embeddings: Universal Transformers (Dehghani et al., 2019), there of fixed sines.
"""

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.arc.augment import DIHEDRALS
from tinyonn_jax.arc.tokens import VOCAB
from tinyonn_jax.config import ModelConfig
from tinyonn_jax.layers import attention, deferred, grouped, layout, linear, short_conv
from tinyonn_jax.layers.base import Param, entropy, normal, ones, rms_norm, stack
from tinyonn_jax.layers.routing import Router, Routing, effective, stream_spec
from tinyonn_jax.layers.tap import Taps
from tinyonn_jax.models.kinds import Layers, layers

T = TypeVar("T")
ATTENTION, FEEDFORWARD = "block.attention", "block.feedforward"


@flax.struct.dataclass
class Block:
    """One block: pre-norm attention and feed-forward, each with the parts of its kind; short convolutions `[K,D]` or None."""

    norm_attention: Any
    conv_attention: Any
    attention: Any
    norm_feedforward: Any
    conv_feedforward: Any
    feedforward: Any


@flax.struct.dataclass
class Params:
    """`embed [V,D]`, `task [tasks,D]` or None, `dihedral [8,D]`, `recursion [R,D]` or None, the block (stacked: leading L),
    `norm [D]`, `head [D,V]`."""

    embed: Any
    task: Any
    dihedral: Any
    recursion: Any
    block: Block
    norm: Any
    head: Any


@flax.struct.dataclass
class Cache:
    """What earlier tokens left in every recursion or layer: keys and values, and what short convolutions read, or None."""

    conv_attention: Any
    attention: Any
    conv_feedforward: Any


@flax.struct.dataclass
class Output:
    """`logits [B,T,V]` float32 of the last recursion; `steps [R,B,T,V]` of all of them, if asked for; a `Routing` per routed
    layer; `depth [B,T]` recursions each token used."""

    logits: Float[Array, "B T V"]
    steps: Float[Array, "R B T V"] | None
    routings: dict[str, Routing]
    depth: Int[Array, "B T"]


def _streams(block: Block, depth: int) -> Block:
    """A stacked block's spec with prototype residual connections between its layers, one stream per router."""

    def connect(x: Any) -> Any:
        if not isinstance(x, Router) or depth < 2:
            return x
        return replace(x, stream=stack(stream_spec(x.proto.shape[-1]), depth - 1))

    return jax.tree.map(connect, block, is_leaf=lambda x: isinstance(x, Router))


def spec(cfg: ModelConfig, tasks: int) -> Params:
    """The parameters of the whole network for `tasks` tasks, as `Param`s."""
    attend, feed = (layer.spec for layer in layers(cfg))
    norm = Param((cfg.dim,), ("embed",), ones)
    conv = short_conv.spec(cfg.dim, cfg.short_conv) if cfg.short_conv else None
    block = Block(norm, conv, attend, norm, conv if feed is not None else None, feed)
    if not cfg.recursed:
        block = stack(block, cfg.depth)
        if cfg.neurons and cfg.prc:
            block = _streams(block, cfg.depth)
    return Params(
        embed=Param((VOCAB, cfg.dim), (None, "embed"), normal(0.5)),
        task=Param((tasks, cfg.dim), (None, "embed"), normal(0.5)) if cfg.task_embedding else None,
        dihedral=Param((DIHEDRALS, cfg.dim), (None, "embed"), normal(0.5)),
        recursion=Param((cfg.depth, cfg.dim), (None, "embed"), normal(0.02)) if cfg.recursion_embedding else None,
        block=block,
        norm=norm,
        head=Param((cfg.dim, VOCAB), ("embed", None), normal(0.02)),
    )


def _embed(
    params: Params, tokens: Int[Array, "B T"], task: Int[Array, " B"], dihedral: Int[Array, " B"], cfg: ModelConfig
) -> Float[Array, "B T D"]:
    x = layout.whole(params.embed)[tokens] + layout.whole(params.dihedral)[dihedral][:, None]
    if params.task is not None:
        x = x + jnp.where(task[:, None] >= 0, layout.whole(params.task)[jnp.maximum(task, 0)], 0)[:, None]  # task -1 is blank
    return x.astype(cfg.dtype)


def _block(
    block: Block,
    x: Float[Array, "B T D"],
    where: attention.Context,
    taps: Taps | None,
    cache: Cache | None,
    does: Layers,
    valid: Bool[Array, "B T"] | None,
):
    """One application of the block: the new x, the routings, the new cache."""
    h = rms_norm(x, block.norm_attention)
    h, near = _convolve(block.conv_attention, h, where, cache and cache.conv_attention)
    h, heads, seen = does.attention.apply(block.attention, h, where, valid, _part_of(taps, ATTENTION), cache and cache.attention)
    x = x + h
    h = rms_norm(x, block.norm_feedforward)
    h, near_feed = _convolve(block.conv_feedforward, h, where, cache and cache.conv_feedforward)
    h, feed = does.feedforward.apply(block.feedforward, h, valid, _part_of(taps, FEEDFORWARD))
    return x + h, _named(ATTENTION, heads) | _named(FEEDFORWARD, feed), cache and Cache(near, seen, near_feed)


def _named(layer: str, routings: dict[str, Routing]) -> dict[str, Routing]:
    """Routings by dotted path; a layer with one router has the role ""."""
    return {f"{layer}.{role}".rstrip("."): routing for role, routing in routings.items()}


def _part_of(taps: Taps | None, layer: str) -> Any:
    """The taps of one layer, by role."""
    return {name.removeprefix(layer).lstrip("."): tap for name, tap in (taps or {}).items() if name.startswith(layer)}


def _convolve(w: Array | None, x: Array, where: attention.Context, cache: Array | None):
    return (x, None) if w is None else short_conv.apply(layout.whole(w), x, where.start, cache, where.layer)


def refined(params: T) -> T:
    """Parameters with their prototype residual connections applied, once and for all: they join routers, not activations."""
    is_router = lambda x: isinstance(x, Router)  # noqa: E731
    return jax.tree.map(lambda x: effective(x) if is_router(x) else x, params, is_leaf=is_router)


def _defer(block: Block, x: Float[Array, "B T D"], cfg: ModelConfig, taps: Taps | None) -> tuple[Block, dict[str, list]]:
    """The block with the gradient of its routed weights cut, and the ports that take it, by layer, where it is cheaper to sum it
    over all recursions at once (see `layers.deferred`)."""
    ports = {}
    if cfg.kind != "dyntrm" or not cfg.recursed or cfg.depth == 1 or not grouped.loops() or layout.current() is not None:
        return block, ports
    slots = {ATTENTION: cfg.heads * cfg.active_heads, FEEDFORWARD: cfg.active_experts}
    if linear.all_modules(cfg.latent_heads, slots[ATTENTION]):
        del slots[ATTENTION]  # one plain matmul, no rows
    for name, k in slots.items():
        role = name.removeprefix("block.")
        layer, norms = getattr(block, role), taps[name].module if taps else None
        cut, ports[role] = deferred.ports(layer.modules, cfg.depth, x.shape[0] * x.shape[1] * k, cfg.dtype, norms)
        block = replace(block, **{role: replace(layer, modules=cut)})
    return block, ports


def _attach(block: Block, ports: dict[str, list]) -> Block:
    """The block of one recursion, with its ports."""
    layers = {role: getattr(block, role) for role in ports}
    return replace(block, **{r: replace(x, modules=deferred.attach(x.modules, ports[r])) for r, x in layers.items()})


def _once(cos: Array, sin: Array) -> tuple[Array, Array]:
    """Both, out of a loop: outside of any, XLA would fuse them into every use and make them anew in each."""
    first, second = jax.lax.map(lambda is_first: jnp.where(is_first, cos, sin), jnp.array([True, False]))
    return first, second


def _unroll(cfg: ModelConfig) -> int:
    """Recursions in one body of the scan: on CPUs and GPUs all, or copies in and out of its stacks, where the backward pass finds
    what it needs, cost a GPU a third of the step and a CPU a tenth. To unroll some of them gains nothing."""
    return cfg.depth if jax.default_backend() in ("cpu", "gpu") and not cfg.remat else 1


def _recurse(
    params: Params,
    x: Array,
    cfg: ModelConfig,
    where,
    valid=None,
    taps=None,
    cache: Any = None,
    isolate=True,
    keep=False,
    stop=0.0,
):
    """The block `depth` times by scan: last x, all x if `keep`, routings and caches with a leading axis R, depth used `[B,T]`.

    With `stop` a token keeps its state once its output entropy is below it; its keys and values follow from that state.
    """
    e0 = x
    unroll = _unroll(cfg)
    if unroll == cfg.depth:
        where = replace(where, turn=_once(*where.turn))
    run = partial(_block, does=layers(cfg, isolate), valid=valid)
    if cfg.remat:
        # Decisions are saved, everything else is computed again: a recomputed low-precision logit cannot flip one (seed 2).
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names("routing"), prevent_cse=False)

    def body(carry, per_step):
        x, depth, cache = carry
        index, own, block, tap, port = per_step
        y = x + jnp.where(index > 0, e0, 0) if cfg.inject else x
        y = y if own is None else (y + own).astype(x.dtype)
        block = _attach(shared, port) if block is None else block
        y, routings, cache = run(block, y, where if cache is None else replace(where, layer=index), tap, cache)
        if stop:
            running = depth == index  # has not stopped before
            x = jnp.where(running[..., None], y, x)
            depth = depth + (running & (entropy(_read_out(params, x)) >= stop))
        else:
            x, depth = y, depth + 1
        return (x, depth, cache), (x if keep else None, routings)

    blocks = None if cfg.recursed else refined(params.block)
    shared, ports = (params.block, {}) if cache is not None else _defer(params.block, x, cfg, taps)
    start = (x, jnp.zeros(x.shape[:2], jnp.int32), cache)  # carried, so that caches are written in place
    own = None if params.recursion is None else layout.whole(params.recursion)  # added in its precision, that of its gradient
    per_step = (jnp.arange(cfg.depth), own, blocks, taps, ports)
    (x, depth, cache), (steps, routings) = jax.lax.scan(body, start, per_step, unroll=unroll)
    return x, steps, routings, cache, jnp.minimum(depth + 1, cfg.depth) if stop else depth


def _read_out(params: Params, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    return jnp.matmul(rms_norm(x, params.norm), params.head.astype(x.dtype), preferred_element_type=jnp.float32)


def apply(
    params: Params,
    batch: Any,
    cfg: ModelConfig,
    taps: Taps | None = None,
    *,
    isolate: bool = True,
    steps: bool = False,
    stop: float = 0.0,
) -> Output:
    """Logits of a `Batch` for the next token at every position, teacher forced.

    `steps`: also those of every recursion. `stop`: a token stops recursing once its output entropy is below this, in nats
    (recursed models, at inference; 0: every recursion).
    """
    t = batch.tokens.shape[1]
    where = attention.context(batch.positions, cfg.head_dim, prefix=batch.prefix, base=cfg.rope_base)
    valid = jnp.arange(t) < batch.length[:, None]
    x = _embed(params, batch.tokens, batch.task, batch.dihedral, cfg)
    x, every, routings, _, depth = _recurse(params, x, cfg, where, valid, taps, isolate=isolate, keep=steps, stop=stop)
    if every is None:
        return Output(_read_out(params, x), None, routings, depth)
    logits = _read_out(params, every)
    return Output(logits[-1], logits, routings, depth)


def init_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` sequences of up to `length` tokens: keys and values `[R, B, length, G·C]`; with short
    convolutions also what each reads, `[R, B, length, D]`."""

    def empty(width: int) -> Array:
        return jnp.zeros((cfg.depth, batch, length, width), cfg.dtype)

    inner = cfg.heads * cfg.head_dim
    block = spec(cfg, 1).block
    near, near_feed = (w and empty(cfg.dim) for w in (block.conv_attention, block.conv_feedforward))
    return Cache(near, attention.Cache(empty(inner), empty(inner)), near_feed)


def decode(
    params: Params,
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T 3"],
    start: Int[Array, " B"],
    prefix: Int[Array, " B"],
    task: Int[Array, " B"],
    dihedral: Int[Array, " B"],
    cfg: ModelConfig,
    stop: float = 0.0,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Next-token logits of T tokens that follow those in the cache, at slots start…start+T-1.

    A prompt goes in at once with start 0 and prefix its length; each later token alone. Every recursion has keys and values of
    its own. `stop` as in `apply`.
    """
    where = attention.context(positions, cfg.head_dim, start, prefix, cfg.rope_base)
    x = _embed(params, tokens, task, dihedral, cfg)
    x, _, _, cache, _ = _recurse(params, x, cfg, where, cache=cache, stop=stop)
    return _read_out(params, x), cache
