"""The network against a naive one with weights of their own for every (recursion, token), and its invariances."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE, by_module, norms
from tests.models import tiny
from tinyonn_jax.config import ModelConfig
from tinyonn_jax.layers import deferred, grouped
from tinyonn_jax.learning import signals
from tinyonn_jax.models import transformer
from tinyonn_jax.models.transformer import ATTENTION, FEEDFORWARD

BATCH = tiny.batch()
REAL = np.arange(BATCH.tokens.shape[1]) < np.asarray(BATCH.length)[:, None]


@partial(jax.jit, static_argnames=("cfg", "isolate"))
def gradients(params, taps, batch, cfg, isolate=True):
    """Loss, routings, gradients of parameters and taps."""

    def loss(params, taps):
        out = transformer.apply(params, batch, cfg, taps, isolate=isolate)
        return tiny.cross_entropy(out.logits, batch), out

    (value, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, taps)
    return value, out, grads


def taps_for(params, cfg, batch=BATCH):
    return signals.make_taps(jax.eval_shape(lambda p: transformer.apply(p, batch, cfg).routings, params))


def unit_rms(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def naive(params, copies, push, cfg: ModelConfig, batch):
    """DynTRM with every module on every token, masked by weight.

    `copies` has weights `[R,N,M,…]` of their own for every recursion and token, `push [R,2,N,D]` is added to the outputs of the
    two routed layers. Returns logits, and per recursion and layer the modules' outputs and weights.
    """
    b, t = batch.tokens.shape
    n, c, groups = b * t, cfg.head_dim, cfg.heads
    block = params.block
    pairs = c // 2
    i = jnp.arange(pairs)
    angle = batch.positions[..., i % 3] * cfg.rope_base ** -((i // 3) / np.ceil(pairs / 3))
    turn = jnp.exp(1j * angle).reshape(n, pairs)
    valid = np.arange(t) < batch.length[:, None]
    slot = np.arange(t)
    seen = (slot <= slot[:, None]) | (slot < batch.prefix[:, None, None])  # [B,T,S]

    def rotate(v):  # [n, C]
        z = (v[:, :pairs] + 1j * v[:, pairs:]) * turn
        return jnp.concatenate([z.real, z.imag], -1)

    def weights(h, router, per_group, k):
        norm = lambda v: v / jnp.sqrt(jnp.sum(v**2, -1, keepdims=True) + 1e-12)  # noqa: E731
        logits = jax.lax.stop_gradient(norm(h) @ norm(router.proto).T - router.gate).reshape(n, -1, per_group)
        rank = jnp.sum(logits[..., None, :] > logits[..., None], -1)  # how many are better
        chosen = jnp.where(rank < k, jnp.exp(logits), 0)
        return (chosen / jnp.sum(chosen, -1, keepdims=True)).reshape(n, -1) * valid.reshape(n, 1)

    x = params.embed[batch.tokens] + params.dihedral[batch.dihedral][:, None] + params.task[batch.task][:, None]
    x = e0 = x.reshape(n, -1)
    outputs, used = [], []
    for r in range(cfg.depth):
        if r > 0 and cfg.inject:
            x = x + e0
        h = unit_rms(x, block.norm_attention)
        weight = weights(h, block.attention.router, cfg.latent_heads // groups, cfg.active_heads)
        heads = []
        for m in range(cfg.latent_heads):
            part = slice((m * groups // cfg.latent_heads) * c, (m * groups // cfg.latent_heads + 1) * c)
            q = rotate(jnp.einsum("nd,ndc->nc", h, copies["w_q"][r, :, m])).reshape(b, t, c)
            k = rotate(h @ block.attention.w_k[:, part]).reshape(b, t, c)
            v = (h @ block.attention.w_v[:, part]).reshape(b, t, c)
            score = jnp.where(seen, jnp.einsum("btc,bsc->bts", q, k) / np.sqrt(c), -1e30)
            o = jnp.einsum("bts,bsc->btc", jax.nn.softmax(score, -1), v).reshape(n, c)
            heads.append(jnp.einsum("nc,ncd->nd", o, copies["w_o"][r, :, m]))
        outputs.append(jnp.stack(heads, 1))
        used.append(weight)
        x = x + jnp.einsum("nmd,nm->nd", outputs[-1], weight) + push[r, 0]

        h = unit_rms(x, block.norm_feedforward)
        weight = weights(h, block.feedforward.router, cfg.experts, cfg.active_experts)
        a, g = jnp.split(jnp.einsum("nd,nmdf->nmf", h, copies["w_in"][r]), 2, -1)
        outputs.append(jnp.einsum("nmf,nmfd->nmd", a / (1 + jnp.exp(-a)) * g, copies["w_out"][r]))
        used.append(weight)
        x = x + jnp.einsum("nmd,nm->nd", outputs[-1], weight) + push[r, 1]
    logits = (unit_rms(x, params.norm) @ params.head).reshape(b, t, -1)
    return logits, outputs, used


@pytest.fixture(scope="module")
def reference():
    """Everything about one step of a tiny DynTRM, from the naive network: loss, gradients, signals `[R,N,M]` and `[R,M]`."""
    cfg = tiny.config()
    params = tiny.params(cfg)
    n = BATCH.tokens.size
    block = params.block
    modules = {"w_q": block.attention.modules.w_q, "w_o": block.attention.modules.w_o, "w_in": block.feedforward.modules.w_in}
    modules["w_out"] = block.feedforward.modules.w_out

    @jax.jit
    def run(params, modules):
        copies = jax.tree.map(lambda w: jnp.broadcast_to(w, (cfg.depth, n, *w.shape)), modules)
        push = jnp.zeros((cfg.depth, 2, n, cfg.dim))

        def loss(params, copies, push):
            logits, outputs, used = naive(params, copies, push, cfg, BATCH)
            return tiny.cross_entropy(logits, BATCH), (logits, outputs, used)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, copies, push)

    (loss, (logits, outputs, used)), (rest, copies, push) = run(params, modules)
    found = {}
    for layer, (name, parts) in enumerate(((ATTENTION, ("w_q", "w_o")), (FEEDFORWARD, ("w_in", "w_out")))):
        weight = np.stack(used[layer::2]).astype(np.float64)
        f, g = np.stack(outputs[layer::2]).astype(np.float64), np.asarray(push, np.float64)[:, layer]
        own = [np.asarray(copies[p], np.float64) for p in parts]
        found[name] = {
            "output": weight * np.linalg.norm(g, axis=-1)[..., None],
            "attribution": np.abs(weight * np.einsum("rnd,rnmd->rnm", g, f)),
            "param": norms(own, 3),
            "module_param": norms([w.sum(1) for w in own], 2),
        }
    total = {name: np.asarray(w, np.float64).sum((0, 1)) for name, w in copies.items()}
    return cfg, params, loss, logits, rest, total, found


@pytest.mark.parametrize("how", ["unrolled", "rematerialised", "scanned"])
def test_loss_gradients_and_signals_of_every_recursion(reference, how, monkeypatch):
    cfg, params, loss, logits, rest, total, found = reference
    cfg, run = dataclasses.replace(cfg, remat=how == "rematerialised"), gradients
    if how == "scanned":  # as on a TPU; traced anew
        monkeypatch.setattr(transformer, "_unroll", lambda cfg: 1)
        run = jax.jit(partial(gradients.__wrapped__), static_argnames="cfg")
    got_loss, out, (grads, tapped) = run(params, taps_for(params, cfg), BATCH, cfg)
    np.testing.assert_allclose(np.asarray(out.logits)[REAL], np.asarray(logits)[REAL], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    block = grads.block
    for got, want in (
        (block.attention.modules.w_q, total["w_q"]),
        (block.attention.modules.w_o, total["w_o"]),
        (block.feedforward.modules.w_in, total["w_in"]),
        (block.feedforward.modules.w_out, total["w_out"]),
        (block.attention.w_k, rest.block.attention.w_k),
        (block.attention.w_v, rest.block.attention.w_v),
        (block.norm_attention, rest.block.norm_attention),
        (block.norm_feedforward, rest.block.norm_feedforward),
        (grads.embed, rest.embed),
        (grads.task, rest.task),
        (grads.dihedral, rest.dihedral),
        (grads.norm, rest.norm),
        (grads.head, rest.head),
    ):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    for leaf in jax.tree.leaves((block.attention.router, block.feedforward.router)):
        np.testing.assert_array_equal(leaf, 0)

    read = signals.read(tapped, out.routings)
    for name, want in found.items():
        for field in ("output", "attribution", "param"):
            assert want[field].max() > 1e-3
            np.testing.assert_allclose(
                by_module(getattr(read[name], field), out.routings[name]), want[field], rtol=1e-3, atol=2e-5
            )
        np.testing.assert_allclose(read[name].module_param, want["module_param"], rtol=1e-3, atol=2e-5)
        np.testing.assert_allclose(read[name].module_output, np.sqrt((want["output"] ** 2).sum(1)), rtol=1e-3, atol=2e-5)


def test_bfloat16_with_remat_repeats_the_decisions_it_made():
    """Twin prototypes a hair apart with very different modules: were a decision made again from activations that differ in the
    last bit, some tokens would send their gradients to the twin."""
    low = tiny.config(dtype="bfloat16", experts=4)
    params = tiny.params(low)

    def twins(router):
        hair = jnp.tile(jnp.array([0, 1e-6]), len(router.gate) // 2)
        return router.replace(proto=jnp.repeat(router.proto[::2], 2, 0) + hair[:, None], gate=jnp.repeat(router.gate[::2], 2))

    block = params.block
    params = params.replace(
        block=block.replace(
            attention=block.attention.replace(router=twins(block.attention.router)),
            feedforward=block.feedforward.replace(router=twins(block.feedforward.router)),
        )
    )
    batch = tiny.batch(8, 12)
    taps = taps_for(params, low, batch)
    _, out, plain = gradients(params, taps, batch, low)
    _, again, remat = gradients(params, taps, batch, dataclasses.replace(low, remat=True))
    for name in (ATTENTION, FEEDFORWARD):
        same = np.asarray(out.routings[name].index) == np.asarray(again.routings[name].index)
        assert same.all()  # the forward passes are the same program
        logits = np.sort(np.asarray(out.routings[name].logits).reshape(-1, 2), -1)
        assert np.mean(logits[:, 1] - logits[:, 0] < 1e-3) > 0.5  # and the decisions are close
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(remat), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(a) + 1e-9, jax.tree_util.keystr(path)


def count(jaxpr, name):
    """How often a primitive stands in a jaxpr and all that it calls."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == name
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(sub, "jaxpr", sub)
                total += count(inner, name) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("isolate", [True, False])
def test_remat_makes_no_decision_twice(isolate):
    """One top-k per router in the forward pass, none in the backward pass."""
    cfg = tiny.config(remat=True)
    shapes = tiny.params(cfg)
    jaxpr = jax.make_jaxpr(partial(gradients, cfg=cfg, isolate=isolate))(shapes, taps_for(shapes, cfg), BATCH)
    assert count(jaxpr.jaxpr, "top_k") == 2


KINDS = ["dense", "dyntrm", "dfc", "dfc_hard"]


@pytest.mark.parametrize("kind", KINDS[1:])  # dense has no taps
def test_taps_change_nothing(kind):
    cfg = tiny.config(kind)
    params = tiny.params(cfg)
    loss, _, (grads, _) = gradients(params, taps_for(params, cfg), BATCH, cfg)
    plain_loss, _, (plain, _) = gradients(params, None, BATCH, cfg)
    assert float(loss) == float(plain_loss)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):  # the last bit: another program, other fusions
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-7 * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_blocks_with_the_same_weights_are_the_recursed_block(kind):
    recursed, stacked = tiny.config(kind), tiny.config(kind, recursed=False, prc=False)
    params = tiny.params(recursed)
    copies = params.replace(block=jax.tree.map(lambda w: np.stack([w] * recursed.depth), params.block))
    loss, out, (grads, taps) = gradients(params, taps_for(params, recursed), BATCH, recursed)
    want_loss, want_out, (want, want_taps) = gradients(copies, taps_for(copies, stacked), BATCH, stacked)
    np.testing.assert_allclose(out.logits, want_out.logits, **CLOSE)
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    want = want.replace(block=jax.tree.map(lambda g: np.sum(g, 0), jax.device_get(want.block)))
    for a, b in zip(jax.tree.leaves((grads, taps)), jax.tree.leaves((want, want_taps)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_sums_over_all_tokens_are_taken_in_float32():
    """Of 16,384 tokens in bfloat16: partial sums of that type would lose most of them."""
    rows, length = 256, 64
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 10, (rows, length)))
    batch = jax.tree.map(lambda x: jnp.resize(x, (rows, *x.shape[1:])), tiny.batch()).replace(
        tokens=tokens,
        positions=jnp.stack(jnp.broadcast_arrays(*np.divmod(np.arange(length), 8), 1), -1) * jnp.ones((rows, 1, 1), int),
        prefix=jnp.full(rows, 20),
        length=jnp.full(rows, length),
    )
    small = {"kind": "dense", "hidden": 16, "recursion_embedding": True, "short_conv": 1}

    def found(dtype):
        cfg = tiny.config(**small, dtype=dtype)

        @jax.jit
        @jax.grad
        def gradient(params):
            logits = transformer.apply(params, batch, cfg).logits
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1))

        params = gradient(tiny.params(cfg))
        return params.recursion, params.block.conv_attention, params.block.conv_feedforward

    for got, want in zip(found("bfloat16"), found("float32"), strict=True):
        assert float(jnp.linalg.norm(got - want)) < 0.015 * float(jnp.linalg.norm(want))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_influences_nothing(kind):
    """Other tokens, positions, tasks in the padding: not a bit of the real logits and of any gradient changes, nor do signals."""
    cfg = tiny.config(kind)
    params = tiny.params(cfg)
    rng = np.random.default_rng(9)
    other = BATCH.replace(
        tokens=jnp.where(REAL, BATCH.tokens, rng.integers(0, 14, REAL.shape)),
        positions=jnp.where(REAL[..., None], BATCH.positions, rng.integers(0, 30, (*REAL.shape, 3))),
        task=jnp.where(BATCH.length > 0, BATCH.task, -1),
        dihedral=jnp.where(BATCH.length > 0, BATCH.dihedral, 7 - BATCH.dihedral),
    )
    taps = taps_for(params, cfg)
    _, out, grads = gradients(params, taps, BATCH, cfg)
    _, out2, grads2 = gradients(params, taps, other, cfg)
    np.testing.assert_array_equal(np.asarray(out.logits)[REAL], np.asarray(out2.logits)[REAL])
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for routing in out2.routings.values():
        assert not np.any(np.asarray(routing.active)[:, ~REAL.reshape(-1)])
        np.testing.assert_array_equal(routing.valid[0], REAL.reshape(-1))


def test_specs_name_the_routed_layers_and_stack_the_blocks():
    made = transformer.spec(tiny.config(recursed=False, depth=5), 4)
    assert made.block.attention.modules.w_q.shape == (5, 4, 8, 6) and made.block.attention.modules.w_q.axes[0] == "layers"
    assert made.task.shape == (4, 8) and made.embed.shape == (14, 8)
    assert set(tiny.apply(tiny.params(tiny.config()), BATCH, cfg=tiny.config()).routings) == {ATTENTION, FEEDFORWARD}
    assert tiny.apply(tiny.params(tiny.config("dense")), BATCH, cfg=tiny.config("dense")).routings == {}


def traced_anew(cfg):
    """Gradients of parameters and taps."""
    params = tiny.params(cfg)
    return jax.jit(partial(gradients.__wrapped__, cfg=cfg))(params, taps_for(params, cfg), BATCH)[2]


@cache
def summed_at_every_recursion(cfg):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "loops", lambda: False)
        patch.setattr(deferred, "weight_gradient", None)  # not asked for
        return traced_anew(cfg)


@pytest.mark.parametrize(("changes", "weights"), [({}, 4), ({"remat": True}, 4), ({"latent_heads": 4}, 2)])
def test_weights_that_outnumber_rows_get_the_gradient_of_all_recursions_at_once(changes, weights, monkeypatch):
    """The same gradients and signals as with a sum at every recursion: heads and experts are more numbers than tokens here."""
    cfg = tiny.config("dyntrm", **{"depth": 3, "experts": 96, "latent_heads": 96, **changes})
    made = []
    at_once = deferred.weight_gradient
    monkeypatch.setattr(deferred, "weight_gradient", lambda *args: made.append(args) or at_once(*args))
    got = traced_anew(cfg)
    assert len(made) == weights
    want = summed_at_every_recursion(dataclasses.replace(cfg, remat=False))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.max(np.abs(b)), err_msg=jax.tree_util.keystr(path))
