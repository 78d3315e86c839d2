"""DynMoE in the limits where it must be something simpler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import CLOSE, make
from tinyonn_jax.layers import dynmoe, experts, grouped
from tinyonn_jax.layers.base import Param
from tinyonn_jax.layers.routing import RouterConfig

D, F = 8, 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, D)), jnp.float32)
apply = jax.jit(dynmoe.apply, static_argnums=2)
dense = jax.jit(experts.mlp, static_argnums=2)


@partial(jax.jit, static_argnums=(0, 3))
def gradient(layer, params, x, extra):
    return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(layer(p, x, extra))), (0, 1))(params, x)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weight", ["softmax", "hard"])
def test_one_expert_and_one_slot_is_a_dense_mlp(gated, weight):
    cfg = dynmoe.Config(D, F, RouterConfig(1, 1, weight=weight), gated)
    params = make(dynmoe.spec(cfg))
    y, (got, got_x) = gradient(lambda p, x, cfg: dynmoe.apply(p, x, cfg)[0], params, X, cfg)
    want_y, (want, want_x) = gradient(experts.mlp, jax.tree.map(lambda w: w[0], params.modules), X, gated)
    np.testing.assert_allclose(y, want_y, **CLOSE)
    np.testing.assert_allclose(got_x, want_x, **CLOSE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, **CLOSE), got.modules, want)


def test_all_experts_with_weight_one_is_their_sum():
    cfg = dynmoe.Config(D, F, RouterConfig(3, 3, weight="hard"))
    params = make(dynmoe.spec(cfg))
    want = sum(dense(jax.tree.map(lambda w, e=e: w[e], params.modules), X, False) for e in range(3))
    np.testing.assert_allclose(apply(params, X, cfg)[0], want, **CLOSE)


def test_equal_experts_make_routing_irrelevant():
    """Softmax weights sum to one: where all experts are the same, the layer is that expert."""
    cfg = dynmoe.Config(D, F, RouterConfig(4, 2), gated=True)
    params = make(dynmoe.spec(cfg))
    params = params.replace(modules=jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params.modules))
    want = dense(jax.tree.map(lambda w: w[0], params.modules), X, True)
    np.testing.assert_allclose(apply(params, X, cfg)[0], want, **CLOSE)


def test_shared_experts_add_to_every_token_routed_or_not():
    cfg = dynmoe.Config(D, F, RouterConfig(4, 2), shared=2)
    params = make(dynmoe.spec(cfg))
    assert params.shared is not None and params.shared.w_in.shape == (D, 2 * F)
    valid = jnp.arange(6) < jnp.array([[4], [0]])
    y, chosen = apply(params, X, cfg, valid=valid)
    alone = apply(params.replace(shared=None), X, cfg, valid=valid)[0]
    shared = dense(params.shared, X, False)
    np.testing.assert_allclose(y, alone + shared, **CLOSE)
    np.testing.assert_array_equal(np.asarray(alone)[~np.asarray(valid)], 0)
    np.testing.assert_array_equal(chosen.active.any(-1).reshape(2, 6), valid)
    assert np.all(np.abs(alone[0, :4]).max(-1) > 0)


def test_spec_declares_stacked_experts_and_no_shared_ones_unless_asked():
    made = dynmoe.spec(dynmoe.Config(D, F, RouterConfig(4, 2), gated=True))
    assert made.shared is None and made.modules.w_in == Param(
        (4, D, 2 * F), ("experts", "embed", "hidden"), made.modules.w_in.init
    )
    assert made.modules.w_out.shape == (4, F, D) and made.router.proto.shape == (4, D)


@pytest.mark.parametrize(("modules", "kernel"), [(4, "auto"), (16, "auto"), (4, "pallas")])
def test_layers_can_be_mapped_over_inputs_and_differentiated_twice_forwards(modules, kernel):
    """jit(vmap(grad)) is a loop of gradients, and the derivative of a gradient along a direction is its finite difference."""
    with grouped.using(kernel):
        _map_and_differentiate(modules)


def _map_and_differentiate(modules):
    cfg = dynmoe.Config(D, 4, RouterConfig(modules, 2, isolate=False))
    params = make(dynmoe.spec(cfg))
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 4, D)), jnp.float32)
    slope = jax.grad(lambda x: jnp.sum(jnp.tanh(dynmoe.apply(params, x, cfg)[0])))
    np.testing.assert_allclose(jax.jit(jax.vmap(slope))(xs), [jax.jit(slope)(x) for x in xs], **CLOSE)
    along = jnp.ones_like(xs[0])
    _, got = jax.jit(lambda x: jax.jvp(slope, (x,), (along,)))(xs[0])
    step = 1e-2
    want = (jax.jit(slope)(xs[0] + step * along) - jax.jit(slope)(xs[0] - step * along)) / (2 * step)
    np.testing.assert_allclose(got, want, atol=2e-2 * float(jnp.abs(want).max()))
