"""What the network says of sequences: token by token as all at once, blind to what comes later; and of recursions and tasks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE
from tests.models import tiny
from tinyonn_jax.models import transformer

BATCH = tiny.batch()


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "dense", "recursion_embedding": True, "short_conv": 2},
        {"kind": "dense", "recursed": False, "inject": False},
        {"recursed": False, "inject": False, "select": "threshold", "cost": "linear"},
        {"shared_experts": 1, "active_heads": 2, "match": "dot"},
        {"kind": "dfc", "recursed": False, "short_conv": 3},
        {"kind": "dfc_hard", "hidden": 0, "short_conv": 1},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_decoding_token_by_token_is_teacher_forcing(changes):
    """Prompts of different lengths go in together; each next token stands at a slot of its own."""
    cfg = tiny.config(**changes)
    params = tiny.params(cfg)
    rows, length = 3, BATCH.tokens.shape[1]
    batch = BATCH.replace(length=jnp.full(rows, length), prefix=jnp.array([4, 2, 3]))
    want = np.asarray(tiny.apply(params, batch, cfg=cfg).logits)
    step = jax.jit(partial(transformer.decode, cfg=cfg))
    cache = transformer.init_cache(cfg, rows, length + 2)
    garbage = jnp.arange(4) >= batch.prefix[:, None]
    prompt = jnp.where(garbage, 13, batch.tokens[:, :4])
    spots = jnp.where(garbage[..., None], 0, batch.positions[:, :4])
    say = (batch.prefix, batch.task, batch.dihedral)
    logits, cache = step(params, cache, prompt, spots, jnp.zeros(rows, int), *say)
    for row in range(rows):
        np.testing.assert_allclose(logits[row, : batch.prefix[row]], want[row, : batch.prefix[row]], rtol=1e-4, atol=1e-4)
    row = jnp.arange(rows)
    for i in range(length - 4):
        at = batch.prefix + i
        logits, cache = step(params, cache, batch.tokens[row, at][:, None], batch.positions[row, at][:, None], at, *say)
        np.testing.assert_allclose(logits[:, 0], want[row, at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"kind": "dense", "short_conv": 2}, {"shared_experts": 1}, {"kind": "dfc", "recursed": False}], ids=str
)
def test_causality_by_gradient(changes):
    """Every token of the batch is another one, so that a row of the embedding is a position: logits at t depend on it exactly
    when the position is not after t, or lies in the prefix; and never on another sequence."""
    cfg = tiny.config(**changes)
    params = tiny.params(cfg)
    batch = tiny.batch(2).replace(tokens=jnp.arange(12).reshape(2, 6), length=jnp.array([6, 6]), prefix=jnp.array([3, 0]))

    @jax.jit
    def jacobian(embed):
        outputs, vjp = jax.vjp(
            lambda e: transformer.apply(params.replace(embed=e), batch, cfg).logits @ jnp.arange(1.0, 15.0), embed
        )
        return jax.lax.map(lambda one: vjp(one)[0], jnp.eye(12).reshape(12, *outputs.shape))  # [12, V, D]

    depends = np.abs(jacobian(params.embed)).max(-1)[:, :12].reshape(2, 6, 2, 6) > 0
    t, s = np.mgrid[:6, :6]
    for b in range(2):
        np.testing.assert_array_equal(depends[b, :, b], (s <= t) | (s < batch.prefix[b]))
        assert not depends[b, :, 1 - b].any()


@pytest.mark.parametrize("inject", [True, False])
def test_recursions_have_embeddings_of_their_own(inject):
    """As the same vector in every token's embedding, which injecting networks add in each recursion, others in the first."""
    cfg = tiny.config("dense", inject=inject, recursion_embedding=True)
    params = tiny.params(cfg)
    e = params.recursion[0]
    every = params.replace(recursion=jnp.stack([e, e]), embed=params.embed - e)
    first = params.replace(recursion=jnp.stack([e, 0 * e]), embed=params.embed - e)
    without = params.replace(recursion=0 * params.recursion)
    want, of_every, of_first = (tiny.apply(p, BATCH, cfg=cfg).logits for p in (without, every, first))
    same, other = (of_every, of_first) if inject else (of_first, of_every)
    np.testing.assert_allclose(same, want, **CLOSE)
    assert float(jnp.abs(other - want).max()) > 1e-2


def test_a_blank_task_is_a_zero_embedding():
    cfg = tiny.config("dense")
    params = tiny.params(cfg)
    blank = tiny.apply(params, BATCH.replace(task=jnp.full(3, -1)), cfg=cfg).logits
    zero = tiny.apply(params.replace(task=jnp.zeros_like(params.task)), BATCH, cfg=cfg).logits
    np.testing.assert_array_equal(blank, zero)
    assert np.abs(blank - tiny.apply(params, BATCH, cfg=cfg).logits).max() > 0.1
    without = tiny.config("dense", task_embedding=False)
    assert transformer.spec(without, 0).task is None
    np.testing.assert_array_equal(tiny.apply(params.replace(task=None), BATCH, cfg=without).logits, zero)


def test_steps_are_the_answers_of_shallower_networks():
    cfg = tiny.config("dense", depth=3)
    params = tiny.params(cfg)
    out = tiny.apply(params, BATCH, cfg=cfg, steps=True)
    np.testing.assert_array_equal(out.steps[-1], out.logits)
    np.testing.assert_array_equal(out.depth, 3)
    for depth in (1, 2):
        shallow = tiny.apply(params, BATCH, cfg=tiny.config("dense", depth=depth)).logits
        np.testing.assert_allclose(out.steps[depth - 1], shallow, rtol=1e-4, atol=1e-5)


def test_entropy_stop_keeps_the_answer_of_the_recursion_that_was_sure():
    cfg = tiny.config("dense", depth=3)
    params = tiny.params(cfg)
    never, at_once = tiny.apply(params, BATCH, cfg=cfg, stop=1e-9), tiny.apply(params, BATCH, cfg=cfg, stop=100.0)
    full = tiny.apply(params, BATCH, cfg=cfg, steps=True)
    np.testing.assert_allclose(never.logits, full.logits, **CLOSE)
    np.testing.assert_array_equal(never.depth, 3)
    np.testing.assert_allclose(at_once.logits, full.steps[0], **CLOSE)
    np.testing.assert_array_equal(at_once.depth, 1)
    # In between, a token stops after the first recursion exactly when it was sure by then.
    p = np.exp(np.asarray(full.steps[0], np.float64))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    stop = float(np.median(entropy))
    some = tiny.apply(params, BATCH, cfg=cfg, stop=stop)
    np.testing.assert_array_equal(np.asarray(some.depth) == 1, entropy < stop)
    np.testing.assert_allclose(
        np.asarray(some.logits)[entropy < stop], np.asarray(full.steps[0])[entropy < stop], rtol=1e-4, atol=1e-4
    )
