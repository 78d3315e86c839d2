"""Parameters from specs, and what all layers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyonn_jax.layers import base
from tinyonn_jax.layers.base import Param, entropy

SPEC = {"a": Param((40, 30), ("embed", None), base.fan_in), "b": {"c": Param((5,), (None,), base.ones)}}


def test_a_leaf_depends_on_its_path_alone():
    key = jax.random.key(1)
    small, large = base.init(key, SPEC), base.init(key, {"0": Param((2,), (None,), base.normal(1.0)), **SPEC})
    np.testing.assert_array_equal(small["a"], large["a"])
    twins = base.init(key, {"a": SPEC["a"], "z": SPEC["a"]})
    assert np.abs(twins["a"] - twins["z"]).max() > 0.1
    assert np.abs(base.init(jax.random.key(2), SPEC)["a"] - small["a"]).max() > 0.1


def test_fan_in_is_the_contracted_axis_of_a_stack_too():
    many = base.init(jax.random.key(0), base.stack({"w": Param((64, 4), ("embed", None), base.fan_in)}, 30))["w"]
    assert many.shape == (30, 64, 4)
    np.testing.assert_allclose(np.std(many), 1 / 8, rtol=0.05)
    assert np.abs(many[0] - many[1]).max() > 0.1  # copies of their own


def test_stack_leads_with_layers():
    stacked = base.stack(SPEC, 3)
    assert stacked["a"].shape == (3, 40, 30) and stacked["a"].axes == ("layers", "embed", None)


def test_axes_name_every_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        Param((2, 3), ("embed",), base.zeros)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_by_hand(dtype):
    x = jnp.array([[3.0, -4.0], [0.0, 0.0]], dtype)
    y = base.rms_norm(x, jnp.array([1.0, 2.0]))
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype(jnp.float32), [[3 / 12.5**0.5, -8 / 12.5**0.5], [0, 0]], rtol=1e-2 if dtype == "bfloat16" else 1e-6
    )


def test_layer_norm_by_hand():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(1, 2, (2, 3, 5)), rng.normal(2, 1, 5), rng.normal(size=5)
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True)) * scale + bias
    np.testing.assert_allclose(base.layer_norm(*(a.astype(np.float32) for a in (x, scale, bias))), want, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_layer_norm_is_that_of_its_formula():
    def formula(x, scale, bias):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * scale + bias

    x, g = jax.random.normal(jax.random.key(0), (2, 3, 5, 7))
    scale, bias = jax.random.normal(jax.random.key(1), (2, 7))
    got, want = (jax.vjp(f, 3 * x + 1, scale, bias)[1](g) for f in (base.layer_norm, formula))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


TURN = base.rotation(jnp.arange(10).reshape(2, 5, 1), 4)


def turned(x):
    cos, sin = TURN
    a, b = x[..., :2], x[..., 2:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (lambda x: base.rotary(x, TURN), turned),
        (
            lambda x: base.layer_norm(x, jnp.arange(1.0, 5), jnp.ones(4)),
            lambda x: jax.nn.standardize(x, -1, epsilon=1e-6) * jnp.arange(1.0, 5) + 1,
        ),
        (base.entropy, lambda x: -jnp.sum(jax.nn.softmax(x) * jax.nn.log_softmax(x), -1)),
        (lambda x: base.linear(x.reshape(-1, 4), jnp.arange(12.0).reshape(4, 3)), lambda x: x @ jnp.arange(12.0).reshape(4, 3)),
    ],
    ids=["rotary", "layer_norm", "entropy", "linear"],
)
def test_gradients_can_be_differentiated_forwards(function, formula):
    """`jax.jvp` of `jax.grad`, also of what has a gradient rule of its own: as of the formula."""
    x, along = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 4))
    got, want = (jax.jvp(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))), (x,), (along,))[1] for f in (function, formula))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs, outputs", [(40, 8), (8, 40)])
@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_linear_is_a_product_and_its_gradients_those_of_one(inputs, outputs, dtype, rtol):
    x, w = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(3, 64, inputs), (3, inputs, outputs)]))

    def gradients(product):
        return jax.value_and_grad(lambda x, w: jnp.sum(jax.vmap(product)(x, w).astype(jnp.float32) ** 2), (0, 1))(x, w)

    for got, want in zip(jax.tree.leaves(gradients(base.linear)), jax.tree.leaves(gradients(jnp.matmul)), strict=True):
        assert got.dtype == want.dtype
        size = jnp.max(jnp.abs(want)).astype(float)
        np.testing.assert_allclose(got.astype(float), want.astype(float), rtol=rtol, atol=rtol * size)


def test_tokens_of_refuses_what_would_be_taken_for_other_tokens():
    x = np.ones((2, 3, 4), np.float32)
    assert base.tokens_of(x, 4, 3).shape == (6, 4)
    for wrong in (x[0], x[..., :2], x.astype(int)):
        with pytest.raises(ValueError, match="3 axes, the last of them 4 wide, of floating point; got"):
            base.tokens_of(wrong, 4, 3)


def test_inputs_without_tokens_and_masks_of_others_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        base.tokens_of(np.ones((0, 3, 4), np.float32), 4, 3)
    x = np.ones((2, 3, 4), np.float32)
    assert base.valid_of(None, x) is None and base.valid_of(np.ones((2, 3), bool), x).shape == (6,)
    for wrong in ((3, 2), (6,), (2,), (1,)):
        with pytest.raises(ValueError, match=r"each token of x \[2, 3, 4\]"):
            base.valid_of(np.ones(wrong, bool), x)


def test_heads_that_cannot_turn_are_refused():
    with pytest.raises(ValueError, match="even size, got 3"):
        base.rotation(np.ones((1, 2, 1), np.int32), 3)
    with pytest.raises(ValueError, match="heads of 6, got 4"):
        base.rotation(np.ones((1, 2, 3), np.int32), 4)


def test_entropy_of_impossible_outcomes():
    logits = np.array([[1.0, -np.inf, 2.0], [0.0, -np.inf, -np.inf]], np.float32)
    p = np.exp(logits[0, ::2]) / np.sum(np.exp(logits[0, ::2]))
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(entropy(v))))
    got = np.asarray(gradient(logits))
    np.testing.assert_allclose(jax.jit(entropy)(logits), [-np.sum(p * np.log(p)), 0], atol=1e-6)
    np.testing.assert_allclose(got[0, ::2], gradient(logits[0, ::2]), rtol=1e-5)
    assert not np.any(got[0, 1]) and not np.any(got[1])
