"""Writing answers: batched greedy decoding with a cache, and the search for every probable completion.

Each is one compiled loop per (prompt length, cap, batch). The model is handed in as two functions: anything with a cache decodes.
Letters: B prompts, T prompt tokens, W completions a prompt, N = B·W rows, V vocabulary. Source: ARC.md's recipe; the search is
the depth-first one of Franzen et al. (2024, "The LLM ARChitect"), level by level.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.arc.batches import Prompts
from tinyonn_jax.arc.tokens import END, ROW, Z_OUTPUT, Z_SEP


class Decoder(NamedTuple):
    """A model that continues sequences; make it once, since a new one compiles anew (parameters are an argument for that reason).

    `init_cache(batch, length)` makes an empty cache: a pytree whose leaves have the batch at axis 1.
    `decode(params, cache, tokens [N,T], positions [N,T,3], start [N], prefix [N], task [N], dihedral [N])` returns the logits
    `[N,T,V]` of the tokens that follow, and the cache with the given ones at slots start…start+T-1. A token sees the slots up to
    its own and those below `prefix`.
    """

    init_cache: Callable[[int, int], Any]
    decode: Callable[..., tuple[Array, Any]]


@flax.struct.dataclass
class Completions:
    """What follows the prompts: `tokens [*B,cap]`, filled up with END.

    `length` counts the tokens including END, `logprob` is their total log-probability in nats, `finished` tells that END was
    reached. A slot that the search left empty is not finished, its length 0 and its log-probability -inf.
    """

    tokens: Int[Array, "*B cap"]
    length: Int[Array, "*B"]
    logprob: Float[Array, "*B"]
    finished: Bool[Array, "*B"]


@partial(jax.jit, static_argnames=("decoder", "cap"))
def greedy(decoder: Decoder, params: Any, prompts: Prompts, cap: int) -> Completions:
    """The most probable next token, again and again, until every row has reached END or emitted `cap` tokens; leaves `[B,…]`."""

    def pick(logits, logprob, finished):
        token = jnp.where(finished, END, jnp.argmax(logits, -1))
        gain = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], -1)[:, 0]
        return jnp.arange(len(token)), token, jnp.where(finished, logprob, logprob + gain)

    return _complete(decoder, params, prompts, cap, 1, pick)


def search_width(min_probability: float) -> int:
    """W = ⌊1 / min_probability⌋: as many completions can be that probable, and no more."""
    return math.floor(1 / min_probability + 1e-9)  # 1 / 0.1 and the like may round down


@partial(jax.jit, static_argnames=("decoder", "cap", "min_probability"))
def search(decoder: Decoder, params: Any, prompts: Prompts, cap: int, min_probability: float) -> Completions:
    """Every completion of at most `cap` tokens whose probability is at least `min_probability`, best first; leaves `[B,W,…]`.

    A depth-first search follows each prefix while its probability is high enough. Prefixes of one length, together with the
    completions that ended before, exclude each other: their probabilities sum to at most 1, so at most W = ⌊1 / min_probability⌋
    of them qualify. A frontier of W rows, expanded by one token at a time, therefore never drops any and finds exactly the
    depth-first set, in a bounded batch: a completed row has one child, itself; children below the threshold are discarded; each
    child takes over its parent's row of the cache.
    """
    width = search_width(min_probability)

    def pick(logits, logprob, finished):
        vocabulary = logits.shape[-1]
        stay = jnp.where(jnp.arange(vocabulary) == END, 0.0, -jnp.inf)
        total = logprob[:, None] + jnp.where(finished[:, None], stay, jax.nn.log_softmax(logits))  # [N,V]
        total = jnp.where(total >= math.log(min_probability), total, -jnp.inf)
        best, child = jax.lax.top_k(total.reshape(-1, width * vocabulary), width)  # [B,W]
        parent = child // vocabulary + width * jnp.arange(len(child))[:, None]
        return parent.ravel(), (child % vocabulary).ravel(), best.ravel()

    found = _complete(decoder, params, prompts, cap, width, pick)
    return jax.tree.map(lambda a: a.reshape(-1, width, *a.shape[1:]), found)


@flax.struct.dataclass
class _State:
    """The rows after `count` tokens: `last [N]` is the newest, `cell [N,2]` its (x, y)."""

    count: Array
    tokens: Array
    last: Array
    cell: Array
    logprob: Array
    finished: Array
    cache: Any


def _complete(decoder: Decoder, params: Any, prompts: Prompts, cap: int, width: int, pick: Callable) -> Completions:
    """Reads the prompts, then extends `width` rows a prompt by what `pick` chooses.

    `pick(logits [N,V], logprob [N], finished [N]) -> (parent [N], token [N], logprob [N])`: new row n is old row `parent[n]` and
    a token more.
    """
    b, t = prompts.tokens.shape
    cache = decoder.init_cache(b, t + cap)
    nothing = jnp.zeros(b, jnp.int32)
    logits, cache = decoder.decode(
        params, cache, prompts.tokens, prompts.positions, nothing, prompts.prefix, prompts.task, prompts.dihedral
    )
    end = prompts.prefix - 1
    n = b * width
    prefix, task, dihedral, z, logits = (
        jnp.repeat(a, width, 0)
        for a in (
            prompts.prefix,
            prompts.task,
            prompts.dihedral,
            prompts.positions[jnp.arange(b), end, 2] - Z_SEP + Z_OUTPUT,
            logits[jnp.arange(b), end],
        )
    )
    state = _State(
        count=jnp.int32(0),
        tokens=jnp.full((n, cap), END, jnp.int32),
        last=jnp.zeros(n, jnp.int32),
        cell=jnp.tile(jnp.array([-1, 0], jnp.int32), (n, 1)),  # left of the first cell
        logprob=jnp.where(jnp.arange(n) % width == 0, 0.0, -jnp.inf),  # one empty completion a prompt
        finished=jnp.zeros(n, bool),
        cache=jax.tree.map(lambda a: jnp.repeat(a, width, 1), cache) if width > 1 else cache,
    )

    def advance(s: _State, logits: Array) -> _State:
        parent, token, logprob = pick(logits, s.logprob, s.finished)
        token = token.astype(jnp.int32)
        tokens, last, cell, finished, cache = s.tokens, s.last, s.cell, s.finished, s.cache
        if width > 1:
            tokens, last, cell, finished = (a[parent] for a in (tokens, last, cell, finished))
            cache = jax.tree.map(lambda a: jnp.take(a, parent, 1), cache)
        x, y = cell[:, 0], cell[:, 1]
        cell = jnp.where((last == ROW)[:, None], jnp.stack([jnp.zeros_like(x), y + 1], -1), jnp.stack([x + 1, y], -1))
        return _State(s.count + 1, tokens.at[:, s.count].set(token), token, cell, logprob, finished | (token == END), cache)

    def step(s: _State) -> _State:
        position = jnp.concatenate([s.cell, z[:, None]], -1)  # of END too, which no token follows to see it
        start = prefix + s.count - 1
        logits, cache = decoder.decode(params, s.cache, s.last[:, None], position[:, None], start, prefix, task, dihedral)
        return advance(dataclasses.replace(s, cache=cache), logits[:, 0])

    def going(s: _State) -> Array:
        return (s.count < cap) & jnp.any(~s.finished & (s.logprob > -jnp.inf))

    s = jax.lax.while_loop(going, step, advance(state, logits))
    used = s.logprob > -jnp.inf
    finished = s.finished & used
    length = jnp.where(finished, jnp.argmax(s.tokens == END, -1) + 1, jnp.where(used, s.count, 0))
    return Completions(jnp.where(used[:, None], s.tokens, END), length, s.logprob, finished)
