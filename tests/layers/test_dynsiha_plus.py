"""DynSIHA+ against multi-head attention in the limit, and against one copy of every head per token in general."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE, by_module, copied, make, norms, summed
from tinyonn_jax.layers import attention, dynsiha_plus, mha, tap
from tinyonn_jax.layers.base import rotary
from tinyonn_jax.layers.dynsiha_plus import Config
from tinyonn_jax.layers.routing import RouterConfig

B, T, D, C = 2, 5, 8, 6
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
TARGET = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
WHERE = attention.context(jnp.asarray(RNG.integers(0, 4, (B, T, 3))), C, prefix=jnp.array([3, 0]))
VALID = jnp.arange(T) < jnp.array([[T], [T - 1]])


@partial(jax.jit, static_argnums=0)
def run(layer, params, x, t):
    """Output and gradients of `layer(params, x, tap) -> y`."""

    def loss(params, x, t):
        y = layer(params, x, t)
        return jnp.sum(jnp.tanh(y) * TARGET), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x, t)
    return y, grads


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(4, 1, groups=4, weight="hard"),  # P = 1, k = 1, weight one
        RouterConfig(4, 1, groups=4, weight="softmax"),  # softmax over the one selected is one
        RouterConfig(4, 0, groups=4, select="threshold"),  # DynSMHA with G = H: none above zero falls back to the one there is
    ],
    ids=["hard", "softmax", "threshold"],
)
def test_one_latent_head_per_group_is_multi_head_attention(router):
    """G = H: every latent head has a key and a value of its own, and every token uses it."""
    cfg = Config(D, C, router)
    params = make(dynsiha_plus.spec(cfg))
    plain = mha.Params(
        w_q=params.modules.w_q.transpose(1, 0, 2).reshape(D, 4 * C),
        w_k=params.w_k,
        w_v=params.w_v,
        w_o=params.modules.w_o.reshape(4 * C, D),
    )
    y, (got, got_x, _) = run(lambda p, x, t: dynsiha_plus.apply(p, x, cfg, where=WHERE)[0], params, X, None)
    want_y, (want, want_x, _) = run(lambda p, x, t: mha.apply(p, x, mha.Config(D, 4, C), where=WHERE)[0], plain, X, None)
    np.testing.assert_allclose(y, want_y, **CLOSE)
    np.testing.assert_allclose(got_x, want_x, **CLOSE)
    np.testing.assert_allclose(got.modules.w_q.transpose(1, 0, 2).reshape(D, 4 * C), want.w_q, **CLOSE)
    np.testing.assert_allclose(got.modules.w_o.reshape(4 * C, D), want.w_o, **CLOSE)
    np.testing.assert_allclose(got.w_k, want.w_k, **CLOSE)
    np.testing.assert_allclose(got.w_v, want.w_v, **CLOSE)
    assert not np.any(got.router.proto)


def copies_of_every_head(params, x, chosen, groups, push, copies):
    """The layer with weights `[N,K,…]` of their own for every (token, slot), each slot attending by itself."""
    n = B * T
    tokens = x.reshape(n, D)
    per_group = chosen.index.shape[-1] // groups
    q = rotary(jnp.einsum("nd,nkdc->nkc", tokens, copies.w_q).reshape(B, T, -1, C), WHERE.turn)
    k = rotary((tokens @ params.w_k).reshape(B, T, groups, C), WHERE.turn)
    v = (tokens @ params.w_v).reshape(B, T, groups, C)
    seen = attention.mask(WHERE, T)[:, 0]
    outputs = []
    for slot in range(q.shape[2]):
        score = jnp.einsum("btc,bsc->bts", q[:, :, slot], k[:, :, slot // per_group]) / np.sqrt(C)
        weight = jax.nn.softmax(jnp.where(seen, score, -1e30), -1)
        outputs.append(jnp.einsum("bts,bsc->btc", weight, v[:, :, slot // per_group]))
    heads = jnp.einsum("nkc,nkcd->nkd", jnp.stack(outputs, 2).reshape(n, -1, C), copies.w_o)
    y = jnp.einsum("nkd,nk->nd", heads, chosen.weight) + push
    return y.reshape(x.shape), heads


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(6, 2, groups=2),  # two of three latent heads in each of two groups
        RouterConfig(4, 2, groups=1, match="dot"),  # the seed's top-k over all heads, one key and value
        RouterConfig(6, 0, groups=3, select="relu"),  # a variable number, idle slots
    ],
    ids=["grouped", "one-group", "relu"],
)
def test_values_gradients_and_taps_against_one_copy_per_token(router):
    cfg = Config(D, C, router)
    params = make(dynsiha_plus.spec(cfg))
    chosen = jax.jit(lambda p, x: dynsiha_plus.apply(p, x, cfg, where=WHERE, valid=VALID)[1])(params, X)
    y, (d_params, d_x, d_tap) = run(
        lambda p, x, t: dynsiha_plus.apply(p, x, cfg, where=WHERE, valid=VALID, tap=t)[0], params, X, tap.zeros(chosen)
    )

    @jax.jit
    def reference(params, copies, x, push):
        def loss(params, copies, x, push):
            y, heads = copies_of_every_head(params, x, chosen, router.groups, push, copies)
            return jnp.sum(jnp.tanh(y) * TARGET), (y, heads)

        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(params, copies, x, push)

    (_, (want_y, heads)), (rest, d_copies, want_x, g) = reference(
        params, copied(params.modules, chosen.index), X, jnp.zeros((B * T, D))
    )
    np.testing.assert_allclose(y, want_y, **CLOSE)
    np.testing.assert_allclose(d_x, want_x, **CLOSE)
    total = summed(d_copies, chosen.index, router.modules)
    for got, want in (
        (d_params.w_k, rest.w_k),
        (d_params.w_v, rest.w_v),
        (d_params.modules.w_q, total.w_q),
        (d_params.modules.w_o, total.w_o),
    ):
        np.testing.assert_allclose(got, want, **CLOSE)

    weight, g = np.asarray(chosen.weight, np.float64), np.asarray(g, np.float64)
    np.testing.assert_allclose(np.sqrt(d_tap.output), weight * np.linalg.norm(g, axis=-1, keepdims=True), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.attribution), np.abs(weight * np.einsum("nd,nkd->nk", g, heads)), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.param), norms(d_copies, 2), **CLOSE)
    np.testing.assert_allclose(np.sqrt(d_tap.module), norms(total, 1), **CLOSE)
    assert by_module(d_tap.param, chosen)[~np.asarray(VALID).reshape(-1)].max() == 0 < by_module(d_tap.param, chosen).max()


def test_at_most_k_heads_of_each_group_are_used():
    cfg = Config(D, C, RouterConfig(6, 2, groups=2))
    chosen = jax.jit(lambda p, x: dynsiha_plus.apply(p, x, cfg)[1])(make(dynsiha_plus.spec(cfg)), X)
    assert np.all(np.asarray(chosen.index)[:, :2] < 3) and np.all(np.asarray(chosen.index)[:, 2:] >= 3)
    np.testing.assert_allclose(chosen.weight.reshape(-1, 2, 2).sum(-1), 1, rtol=1e-6)


def test_cached_in_chunks_equals_one_call():
    cfg = Config(D, C, RouterConfig(6, 2, groups=2))
    params = make(dynsiha_plus.spec(cfg))
    want = jax.jit(lambda p, x: dynsiha_plus.apply(p, x, cfg)[0])(params, X)

    @jax.jit
    def step(params, x, cache, first):
        positions = jnp.broadcast_to(first + jnp.arange(x.shape[1])[:, None], (*x.shape[:2], 1))
        where = attention.context(positions, C, jnp.full(B, first))
        y, _, cache = dynsiha_plus.apply(params, x, cfg, where=where, cache=cache)
        return y, cache

    cache = attention.Cache(jnp.zeros((B, T + 1, 2 * C)), jnp.zeros((B, T + 1, 2 * C)))
    outputs = []
    for first, last in ((0, 3), (3, 4), (4, 5)):
        y, cache = step(params, X[:, first:last], cache, first)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, **CLOSE)
