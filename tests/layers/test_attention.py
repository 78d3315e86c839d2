"""Attention: who sees whom by gradient, the CPU path against jax.nn's, rotary positions, cached against uncached."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE, make
from tinyonn_jax.layers import attention, mha
from tinyonn_jax.layers.base import rotary, rotation

B, T, D, G, C = 2, 6, 8, 2, 6
LAYER = mha.Config(D, G, C)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
POSITIONS = jnp.asarray(RNG.integers(0, 5, (B, T, 3)))
PREFIX = jnp.array([3, 0])


@pytest.fixture(scope="module")
def params():
    return make(mha.spec(LAYER))


@jax.jit
def uncached(params, x, positions, prefix):
    return mha.apply(params, x, LAYER, where=attention.context(positions, C, prefix=prefix))[0]


@jax.jit
def cached(params, x, cache, positions, start, prefix, layer=None):
    where = attention.context(positions, C, start, prefix).replace(layer=layer)
    return mha.apply(params, x, LAYER, where=where, cache=cache)


def naive(params, x, positions, prefix):
    """Loops over sequences, heads and positions, in float64; rotary positions as complex numbers."""
    w_q, w_k, w_v, w_o = (np.asarray(w, np.float64) for w in (params.w_q, params.w_k, params.w_v, params.w_o))
    x, positions = np.asarray(x, np.float64), np.asarray(positions)

    def turn(v, position):  # C/2 complex pairs; pair i turns with axis i mod 3, with wavelengths from 2π to 2π·100
        pairs = C // 2
        angle = [position[i % 3] * 100.0 ** (-(i // 3) / np.ceil(pairs / 3)) for i in range(pairs)]
        z = (v[:pairs] + 1j * v[pairs:]) * np.exp(1j * np.array(angle))
        return np.concatenate([z.real, z.imag])

    out = np.zeros((B, T, D))
    for b in range(B):
        for h in range(G):
            part = slice(h * C, (h + 1) * C)
            q = [turn(x[b, t] @ w_q[:, part], positions[b, t]) for t in range(T)]
            k = [turn(x[b, t] @ w_k[:, part], positions[b, t]) for t in range(T)]
            for t in range(T):
                seen = [s for s in range(T) if s <= t or s < prefix[b]]
                score = np.array([q[t] @ k[s] for s in seen]) / np.sqrt(C)
                weight = np.exp(score - score.max())
                head = sum(w * (x[b, s] @ w_v[:, part]) for w, s in zip(weight / weight.sum(), seen, strict=True))
                out[b, t] += head @ w_o[part]
    return out


def test_multi_head_attention_against_loops(params):
    np.testing.assert_allclose(uncached(params, X, POSITIONS, PREFIX), naive(params, X, POSITIONS, np.asarray(PREFIX)), **CLOSE)


def test_causality_and_prefix_by_gradient(params):
    """Output t depends on token s exactly when s <= t, or s lies in the prefix."""
    one = lambda x, b: uncached(params, x[None], POSITIONS[b : b + 1], PREFIX[b : b + 1])[0].sum(-1)  # noqa: E731
    jacobian = jax.jit(jax.jacrev(one), static_argnums=1)
    t, s = np.mgrid[:T, :T]
    for b in range(B):
        depends = np.abs(jacobian(X[b], b)).max(-1) > 0
        np.testing.assert_array_equal(depends, (s <= t) | (s < int(PREFIX[b])))


@partial(jax.jit, static_argnums=0)
def with_gradients(attend, q, k, v, seen, g):
    y, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, seen), q, k, v)
    return y, vjp(g)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_the_plain_path_is_dot_product_attention(heads, groups):
    rng = np.random.default_rng(1)
    q, g = (jnp.asarray(rng.normal(size=(2, 5, heads, C)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 7, groups, C)), jnp.float32) for _ in range(2))
    seen = jnp.asarray(rng.random((2, 1, 5, 7)) < 0.5).at[..., 0].set(True)
    got = with_gradients(lambda q, k, v, seen: attention._heads_first(q, k, v, seen, None), q, k, v, seen, g)
    want = with_gradients(lambda q, k, v, seen: jax.nn.dot_product_attention(q, k, v, mask=seen), q, k, v, seen, g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("heads", [2, 6])
def test_prefix_and_causal_parts_make_the_mask(heads):
    """Two calls without a mask, as flash attention wants them, against one with it: prefixes none, one, some and all."""
    rng = np.random.default_rng(4)
    q, g = (jnp.asarray(rng.normal(size=(4, 5, heads, C)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(4, 5, 2, C)), jnp.float32) for _ in range(2))
    prefix = jnp.array([0, 1, 3, 5])
    seen = attention.mask(attention.context(jnp.zeros((4, 5, 1), int), C, prefix=prefix), 5)
    got = with_gradients(lambda q, k, v, seen: attention.prefix_causal(q, k, v, prefix, "xla"), q, k, v, seen, g)
    want = with_gradients(lambda q, k, v, seen: jax.nn.dot_product_attention(q, k, v, mask=seen), q, k, v, seen, g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_query_heads_read_the_group_they_belong_to():
    """Values tell groups apart: head i of six must return the value of group i // 3."""
    v = jnp.arange(2.0)[None, None, :, None] * jnp.ones((1, 4, 2, C)) + 1
    q, k = jnp.ones((1, 4, 6, C)), jnp.ones((1, 4, 2, C))
    o, _ = jax.jit(attention.attend)(q, k, v, attention.in_order(1, 4, C))
    np.testing.assert_allclose(o[0, :, :, 0], np.tile([1, 1, 1, 2, 2, 2], (4, 1)), rtol=1e-6)


def test_attend_bfloat16_is_near_float32():
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 2, C)), jnp.float32) for _ in range(3))
    attend = jax.jit(lambda q, k, v: attention.attend(q, k, v, attention.in_order(1, 6, C))[0])
    low = attend(*(a.astype(jnp.bfloat16) for a in (q, k, v)))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attend(q, k, v), atol=0.05)


def test_rotary_meets_by_difference_of_positions_alone():
    rng = np.random.default_rng(3)
    size = 8
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, size)), jnp.float32) for _ in range(2))

    @jax.jit
    def meet(at_q, at_k):
        return jnp.sum(rotary(q, rotation(at_q[None, None], size)) * rotary(k, rotation(at_k[None, None], size)))

    a, b, shift = np.array([3, 1, 4]), np.array([1, 5, 9]), np.array([20, -7, 11])
    assert float(meet(a, b)) == pytest.approx(float(meet(a + shift, b + shift)), abs=1e-4)
    for axis in range(3):  # every axis counts
        assert abs(float(meet(a, b)) - float(meet(a + 2 * np.eye(3, dtype=int)[axis], b))) > 1e-3


def test_the_gradient_of_a_turn_is_turned_back():
    x, g = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
    turn = rotation(jax.random.randint(jax.random.key(1), (2, 5, 2), 0, 9), 8)
    back = jax.jit(lambda x, g: jax.vjp(lambda x: rotary(x, turn), x)[1](g)[0])(x, g)
    for i in np.ndindex(x.shape):  # a turn is linear: its gradient takes g to what each unit of x does to it
        unit = jnp.zeros_like(x).at[i].set(1.0)
        np.testing.assert_allclose(back[i], jnp.vdot(g, rotary(unit, turn)), rtol=1e-5, atol=1e-6)


def test_rotation_of_text_positions_by_hand():
    cos, sin = rotation(jnp.arange(3)[None, :, None], 4, base=100.0)
    angle = np.arange(3)[:, None] * np.array([1.0, 0.1])  # two pairs: 100^0 and 100^(-1/2)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angle), atol=1e-6)
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    turned = rotary(x, (cos[:, 2:], sin[:, 2:])).reshape(-1)  # pairs (x0, x2) and (x1, x3), by 2 and by 0.2
    np.testing.assert_allclose(turned, [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)], atol=1e-6)


def test_decoding_in_chunks_equals_one_call(params):
    """The prompt at once, then chunks of one and two, on a cache longer than needed; what lies beyond must not matter."""
    prefix = jnp.array([3, 2])
    want = uncached(params, X, POSITIONS, prefix)
    cache = attention.Cache(jnp.full((B, T + 3, G * C), 7.0), jnp.full((B, T + 3, G * C), -7.0))
    outputs = []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        y, cache = cached(params, X[:, first:last], cache, POSITIONS[:, first:last], jnp.full(B, first), prefix)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, **CLOSE)
    np.testing.assert_array_equal(cache.keys[:, T:], 7.0)


def test_sequences_of_a_batch_decode_at_slots_of_their_own(params):
    """Row 1's prompt is one token shorter: its padding lies in the cache until the next token overwrites it."""
    prefix = jnp.array([3, 2])
    want = uncached(params, X, POSITIONS, prefix)
    cache = attention.Cache(jnp.zeros((B, T, G * C)), jnp.zeros((B, T, G * C)))
    garbage = X[:, :3].at[1, 2].set(99.0)
    y, cache = cached(params, garbage, cache, POSITIONS[:, :3], jnp.zeros(B, int), prefix)
    np.testing.assert_allclose(y[0], want[0, :3], **CLOSE)
    np.testing.assert_allclose(y[1, :2], want[1, :2], **CLOSE)
    for i in range(2):
        at = prefix + i
        row = jnp.arange(B)
        y, cache = cached(params, X[row, at][:, None], cache, POSITIONS[row, at][:, None], at, prefix)
        np.testing.assert_allclose(y[:, 0], want[row, at], **CLOSE)


def test_layers_that_share_a_cache_extend_their_own_part(params):
    """Layer 1 of three: the same output as with a cache of its own, and the others' slots stay as they are."""
    prefix, start = jnp.array([3, 2]), jnp.array([1, 3])
    one = attention.Cache(*(jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, G * C)), jnp.float32) for seed in (5, 6)))
    want, own = cached(params, X[:, :2], one, POSITIONS[:, :2], start, prefix)
    all = attention.Cache(*(jnp.stack([a - 1, a, a + 1]) for a in (one.keys, one.values)))
    got, shared = cached(params, X[:, :2], all, POSITIONS[:, :2], start, prefix, jnp.int32(1))
    np.testing.assert_array_equal(got, want)
    for a, b, before in ((shared.keys, own.keys, one.keys), (shared.values, own.values, one.values)):
        np.testing.assert_array_equal(a, jnp.stack([before - 1, b, before + 1]))
        assert np.abs(b - before).max() > 0.1


@pytest.mark.parametrize("shape", [(B, T - 1, G * C), (B, T, G, C), (B + 1, T, G * C), (2, B, T, G * C)])
def test_a_cache_that_does_not_fit_is_refused(params, shape):
    with pytest.raises(ValueError, match="has no room for rows"):
        cached(params, X, attention.Cache(jnp.zeros(shape), jnp.zeros(shape)), POSITIONS, jnp.zeros(B, int), jnp.zeros(B, int))


def test_a_context_of_other_tokens_is_refused(params):
    for wrong in ((B, 1, C), (B + 1, T, C), (B, T, 2 * C)):
        with pytest.raises(ValueError, match="made for other tokens"):
            mha.apply(params, X, LAYER, where=attention.in_order(*wrong))
    with pytest.raises(ValueError, match="made for other tokens"):
        mha.apply(params, X, LAYER, where=attention.context(POSITIONS, C, prefix=jnp.zeros(B + 1, int)))


def test_a_cache_needs_to_know_where_tokens_start(params):
    cache = attention.Cache(jnp.zeros((B, T, G * C)), jnp.zeros((B, T, G * C)))
    with pytest.raises(ValueError, match="at which slots the tokens start"):
        mha.apply(params, X, LAYER, cache=cache)


def test_one_context_serves_every_sequence(params):
    one = attention.context(POSITIONS[:1], C, prefix=PREFIX[:1])
    all = attention.context(jnp.repeat(POSITIONS[:1], B, 0), C, prefix=jnp.repeat(PREFIX[:1], B))
    np.testing.assert_array_equal(mha.apply(params, X, LAYER, where=one)[0], mha.apply(params, X, LAYER, where=all)[0])
    q = jnp.asarray(RNG.normal(size=(B, T, G, C)), jnp.float32)
    alike = (attention.prefix_causal(q, q, q, prefix, "xla") for prefix in (one.prefix, all.prefix))
    np.testing.assert_array_equal(*alike)


def test_without_a_cache_tokens_start_at_their_own_keys(params):
    """Wherever a context for a cache says that they start: a token must not come to see later ones."""
    where = attention.context(POSITIONS, C, start=jnp.array([2, 1]))
    np.testing.assert_array_equal(mha.apply(params, X, LAYER, where=where)[0], uncached(params, X, POSITIONS, jnp.zeros(B, int)))
