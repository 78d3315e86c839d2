"""Writing answers: greedy decoding with a cache, in batches that stay full, and the search for every probable completion.

The model is handed in as two functions: anything with a cache decodes. Each way compiles once per (prompt length, cap, batch).
Letters: B prompts, T prompt tokens, W completions a prompt, N rows decoded side by side, M prompts read into them at once, K
prompts answered, V vocabulary. Source: mdlARC; the search is the depth-first one of Franzen et al. (2024, "The LLM ARChitect"),
level by level.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.arc.batches import Prompts, round_up
from tinyonn_jax.arc.tokens import END, ROW, Z_OUTPUT, Z_SEP


class Decoder(NamedTuple):
    """A model that continues sequences; make it once, since a new one compiles anew (parameters are an argument for that reason).

    `init_cache(batch, length)` makes an empty cache: a pytree whose leaves have the batch at axis 1, the slots at axis 2.
    `decode(params, cache, tokens [N,T], positions [N,T,3], start [N], prefix [N], task [N], dihedral [N])` returns the logits
    `[N,T,V]` of the tokens that follow, and the cache with the given ones at slots start…start+T-1. A token sees the slots up to
    its own and those below `prefix`. The rows of a call divide by `multiple`: the devices that share them.
    """

    init_cache: Callable[[int, int], Any]
    decode: Callable[..., tuple[Array, Any]]
    multiple: int = 1


REFILL = 1 / 4
"""The share of a batch that is refilled at once: reading few prompts at a time wastes work, waiting for many leaves rows idle."""


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


@flax.struct.dataclass
class _Rows:
    """N answers in the making: `count [N]` of `tokens [N,cap]` are there, the newest is `last [N]` at (x, y) = `cell [N,2]`.

    `z` is that of the answer's cells. A row that is not `going` waits for its next prompt.
    """

    prefix: Any
    task: Any
    dihedral: Any
    z: Any
    count: Any
    tokens: Any
    last: Any
    cell: Any
    logprob: Any
    finished: Any

    @property
    def going(self) -> Any:
        return ~self.finished & (self.count < self.tokens.shape[1])


def greedy(
    decoder: Decoder, params: Any, ask: Callable[[Sequence[int]], Prompts], count: int, cap: int, batch: int
) -> Iterator[tuple[Int[np.ndarray, "K"], Completions]]:
    """The most probable next token, again and again, until END or `cap` tokens: of `count` prompts, in batches that stay full.

    Whenever `REFILL` of the rows have come to their end, as many new prompts are read into them, and the others go on where they
    are. What a prompt is answered does not depend on its company.

    Args:
        ask: the prompts of these numbers (each below `count`), all filled up to one length.
        batch: rows decoded side by side, rounded up to what the decoder divides by.

    Yields:
        The numbers of prompts whose answers are complete, and these, leaves `[K,…]`; each number once.
    """
    size = round_up(math.ceil(batch * REFILL), decoder.multiple)
    n = max(round_up(batch, decoder.multiple), size)
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
    asked = np.full(n, -1)  # by the rows; -1: by nobody
    zeros = np.zeros(n, np.int32)
    rows = _Rows(
        prefix=zeros + 1,
        task=zeros,
        dihedral=zeros,
        z=zeros,
        count=zeros,
        tokens=np.full((n, cap), END, np.int32),
        last=zeros,
        cell=np.zeros((n, 2), np.int32),
        logprob=np.zeros(n, np.float32),
        finished=np.ones(n, bool),
    )

    def filled(numbers: range) -> Prompts:
        return ask([*numbers, *[numbers[-1]] * (size - len(numbers))])

    if not groups:
        return
    prompts = filled(groups[0])
    cache = _empty(decoder, n, prompts.tokens.shape[1] + cap)
    for group, after in zip(groups, [*groups[1:], range(0)], strict=True):
        into = np.full(size, n, np.int32)  # nowhere
        into[: len(group)] = np.flatnonzero(asked < 0)[: len(group)]
        asked[into[: len(group)]] = group
        leave = n - len(after) if after else 0
        cache, going = _turn(decoder, params, cache, rows, prompts, into, np.int32(leave))
        prompts = filled(after) if after else prompts  # while the devices work
        rows = jax.device_get(going)
        done = np.flatnonzero((asked >= 0) & ~rows.going)
        yield asked[done], Completions(rows.tokens[done], rows.count[done], rows.logprob[done], rows.finished[done])
        asked[done] = -1


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(decoder: Decoder, rows: int, length: int) -> Any:
    """An empty cache, made where it belongs."""
    return decoder.init_cache(rows, length)


@partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _turn(
    decoder: Decoder, params: Any, cache: Any, rows: _Rows, prompts: Prompts, into: Int[Array, "M"], leave: Int[Array, ""]
) -> tuple[Any, _Rows]:
    """Reads M prompts into these rows (N: nowhere), then extends all rows until no more than `leave` of them are going."""
    m, t = prompts.tokens.shape
    logits, z, read = _read(decoder, params, prompts, t)
    zeros = jnp.zeros(m, jnp.int32)
    new = _Rows(
        prefix=prompts.prefix,
        task=prompts.task,
        dihedral=prompts.dihedral,
        z=z,
        count=zeros,
        tokens=jnp.full((m, rows.tokens.shape[1]), END, jnp.int32),
        last=zeros,
        cell=_before(m),
        logprob=jnp.zeros(m),
        finished=jnp.zeros(m, bool),
    )
    cache = jax.tree.map(lambda all, some: all.at[:, into, :t].set(some, mode="drop"), cache, read)
    rows = jax.tree.map(lambda all, some: all.at[into].set(some, mode="drop"), rows, _extend(new, logits))

    def step(state: tuple[Any, _Rows]) -> tuple[Any, _Rows]:
        cache, s = state
        position = jnp.concatenate([s.cell, s.z[:, None]], -1)
        start = s.prefix + s.count - 1
        logits, cache = decoder.decode(params, cache, s.last[:, None], position[:, None], start, s.prefix, s.task, s.dihedral)
        return cache, _extend(s, logits[:, 0])

    return jax.lax.while_loop(lambda state: jnp.sum(state[1].going) > leave, step, (cache, jax.tree.map(jnp.asarray, rows)))


def _extend(s: _Rows, logits: Float[Array, "N V"]) -> _Rows:
    """Rows that are going, by their most probable token."""
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    here = s.going[:, None] & (jnp.arange(s.tokens.shape[1]) == s.count[:, None])
    return s.replace(  # pyright: ignore[reportAttributeAccessIssue]
        count=s.count + s.going,
        tokens=jnp.where(here, token[:, None], s.tokens),
        last=token,
        cell=_after(s.cell, s.last),
        logprob=jnp.where(s.going, s.logprob + jnp.max(jax.nn.log_softmax(logits), -1), s.logprob),
        finished=s.finished | (s.going & (token == END)),
    )


def _read(decoder: Decoder, params: Any, prompts: Prompts, length: int) -> tuple[Float[Array, "B V"], Int[Array, "B"], Any]:
    """Logits of the first token of each answer, z of its cells, and a cache of `length` slots that holds the prompts."""
    b = len(prompts.tokens)
    cache, nothing = decoder.init_cache(b, length), jnp.zeros(b, jnp.int32)
    logits, cache = decoder.decode(
        params, cache, prompts.tokens, prompts.positions, nothing, prompts.prefix, prompts.task, prompts.dihedral
    )
    row, end = jnp.arange(b), prompts.prefix - 1
    return logits[row, end], jnp.asarray(prompts.positions)[row, end, 2] - Z_SEP + Z_OUTPUT, cache


def _before(rows: int) -> Int[Array, "N 2"]:
    """(x, y) left of an answer's first cell."""
    return jnp.tile(jnp.array([-1, 0], jnp.int32), (rows, 1))


def _after(cell: Int[Array, "N 2"], token: Int[Array, "N"]) -> Int[Array, "N 2"]:
    """(x, y) of what follows a token there; also of END, which no token follows to see it."""
    x, y = cell[:, 0], cell[:, 1]
    return jnp.where((token == ROW)[:, None], jnp.stack([jnp.zeros_like(x), y + 1], -1), jnp.stack([x + 1, y], -1))


def search_width(min_probability: float) -> int:
    """W = ⌊1 / min_probability⌋: as many completions can be that probable, and no more."""
    return math.floor(1 / min_probability + 1e-9)  # 1 / 0.1 and the like may round down


@flax.struct.dataclass
class _Frontier:
    """Rows after `count` tokens, each a prefix of an answer to prompt `owner [N]`, or all of one. `last [N]` is its last token,
    `cell [N,2]` where that lies, `logprob [N]` -inf where there is none. `fits`: none ever had to be left out."""

    count: Array
    owner: Array
    tokens: Array
    last: Array
    cell: Array
    logprob: Array
    finished: Array
    fits: Array
    cache: Any


ROWS_EACH = 3
"""Rows of a search for each prompt: more than most have prefixes of enough probability, fewer than a single one may have."""


def search(
    decoder: Decoder,
    params: Any,
    ask: Callable[[Sequence[int]], Prompts],
    count: int,
    cap: int,
    min_probability: float,
    batch: int,
) -> Iterator[tuple[Int[np.ndarray, "K"], Completions]]:
    """Every completion of at most `cap` tokens whose probability is at least `min_probability`, best first; of `count` prompts.

    A depth-first search follows each prefix while its probability is high enough. Prefixes of one length, together with the
    completions that ended before, exclude each other: their probabilities sum to at most 1, so at most W = ⌊1 / min_probability⌋
    of them qualify, and most often few do. Prompts share a frontier of rows, expanded by one token at a time, which finds exactly
    the depth-first set unless it overflows; then half as many prompts are asked at once, and after each success one more.

    Args:
        ask: the prompts of these numbers (each below `count`), all filled up to one length.
        batch: rows of the frontier, rounded up to what the decoder divides by, and to W.

    Yields:
        Numbers of prompts, and what follows them, leaves `[K,W,…]`; each number once.
    """
    width = search_width(min_probability)
    size = round_up(max(batch // ROWS_EACH, 1), decoder.multiple)
    rows = round_up(max(batch, size, width), decoder.multiple)
    first, some = 0, size
    while first < count:
        numbers = np.arange(first, min(first + some, count))
        prompts = ask([*numbers.tolist(), *[first] * (size - len(numbers))])
        asked = np.arange(size) < len(numbers)
        found, fits = jax.device_get(_search(decoder, params, prompts, asked, cap, min_probability, rows))
        if not fits and len(numbers) > 1:
            some = len(numbers) // 2
            continue
        yield numbers, jax.tree.map(lambda a, real=numbers: a[: len(real)], found)
        first, some = first + len(numbers), min(some + 1, size)


@partial(jax.jit, static_argnames=("decoder", "cap", "min_probability", "rows"))
def _search(
    decoder: Decoder, params: Any, prompts: Prompts, asked: Bool[Array, "B"], cap: int, min_probability: float, rows: int
) -> tuple[Completions, Bool[Array, ""]]:
    """What follows the prompts that are asked, leaves `[B,W,…]`, and whether the frontier of N rows held it all. A completed row
    has one child, itself; children below the threshold are discarded; each takes over its parent's row of the cache."""
    logits, z, cache = _read(decoder, params, prompts, prompts.tokens.shape[1] + cap)
    b = len(logits)
    start = _Frontier(
        count=jnp.int32(0),
        owner=jnp.arange(b),
        tokens=jnp.full((b, cap), END, jnp.int32),
        last=jnp.zeros(b, jnp.int32),
        cell=_before(b),
        logprob=jnp.where(asked, 0.0, -jnp.inf),  # one empty completion each
        finished=jnp.zeros(b, bool),
        fits=jnp.bool_(True),
        cache=cache,
    )

    def expand(s: _Frontier, logits: Array, cache: Any) -> _Frontier:
        vocabulary = logits.shape[-1]
        stay = jnp.where(jnp.arange(vocabulary) == END, 0.0, -jnp.inf)
        total = s.logprob[:, None] + jnp.where(s.finished[:, None], stay, jax.nn.log_softmax(logits))  # [N,V]
        total = jnp.where(total >= math.log(min_probability), total, -jnp.inf).ravel()
        best, child = jax.lax.top_k(jnp.pad(total, (0, max(rows - total.size, 0)), constant_values=-jnp.inf), rows)
        parent, token = jnp.minimum(child // vocabulary, len(logits) - 1), (child % vocabulary).astype(jnp.int32)
        return _Frontier(
            count=s.count + 1,
            owner=s.owner[parent],
            tokens=s.tokens[parent].at[:, s.count].set(token),
            last=token,
            cell=_after(s.cell[parent], s.last[parent]),
            logprob=best,
            finished=s.finished[parent] | (token == END),
            fits=s.fits & (jnp.sum(total > -jnp.inf) <= rows),
            cache=jax.tree.map(lambda a: jnp.take(a, parent, 1), cache),
        )

    def step(s: _Frontier) -> _Frontier:
        prefix, task, dihedral = (a[s.owner] for a in (prompts.prefix, prompts.task, prompts.dihedral))
        position = jnp.concatenate([s.cell, z[s.owner, None]], -1)
        at = prefix + s.count - 1
        logits, cache = decoder.decode(params, s.cache, s.last[:, None], position[:, None], at, prefix, task, dihedral)
        return expand(s, logits[:, 0], cache)

    def going(s: _Frontier) -> Array:
        return s.fits & (s.count < cap) & jnp.any(~s.finished & (s.logprob > -jnp.inf))

    s = jax.lax.while_loop(going, step, expand(start, logits, cache))
    return _by_owner(s, b, search_width(min_probability)), s.fits


def _by_owner(s: _Frontier, prompts: int, width: int) -> Completions:
    """The rows of each prompt `[B,W,…]`, best first, as they all stand in the frontier."""
    used = s.logprob > -jnp.inf
    before = (s.owner[:, None] == s.owner) & used & (jnp.arange(len(used)) < jnp.arange(len(used))[:, None])
    rank = jnp.sum(before, -1)
    place = jnp.where(used & (rank < width), s.owner * width + rank, prompts * width)  # nowhere
    length = jnp.where(s.finished, jnp.argmax(s.tokens == END, -1) + 1, s.count)

    def laid(rows: Array, empty: Any) -> Array:
        out = jnp.full((prompts * width, *rows.shape[1:]), empty, rows.dtype)
        return out.at[place].set(rows, mode="drop").reshape(prompts, width, *rows.shape[1:])

    return Completions(laid(s.tokens, END), laid(length, 0), laid(s.logprob, -jnp.inf), laid(s.finished, False))
