"""Routed layers on eight simulated devices: the numbers of one device, and what is sent between devices."""

from dataclasses import replace
from functools import cache
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.naive import hand_made, make
from tinyonn_jax.config import MeshConfig
from tinyonn_jax.layers import experts, linear, parallel, routing, tap
from tinyonn_jax.layers.base import Param, zeros
from tinyonn_jax.layers.layout import over
from tinyonn_jax.learning import signals
from tinyonn_jax.training import sharding

N, D, F, M = 32, 8, 6, 8
RNG = np.random.default_rng(0)
X, TARGET = (jnp.asarray(RNG.normal(size=(N, D)), jnp.float32) for _ in range(2))


def tables(slots: int, groups: int) -> dict[str, routing.Routing]:
    """Ways the slots of N tokens can fall on M modules, of shapes alike, so that one program runs them all."""
    first = np.repeat(np.arange(groups) * (M // groups), slots // groups)
    any_of = first + RNG.integers(0, M // groups, (N, slots))
    some = RNG.random((N, slots)) < 0.6
    found = {
        "all in use": (any_of, some | True),
        "idle slots": (any_of, some),
        "empty modules": (first + (any_of - first) // 2, some),
        "all tokens on one": (0 * any_of, (np.arange(slots) == 0) & (any_of >= 0)),
        "none in use": (any_of, some & False),
    }
    weight = RNG.normal(size=(N, slots))
    return {name: hand_made(index, weight, active, M, D, groups=groups) for name, (index, active) in found.items()}


def mlps(w, x, r, t):
    return experts.routed_mlp(experts.Mlp(*w), x, parallel.fit(r), True, t)


def heads(w, x, r, t):
    """Into the slots and out of them, as latent heads are."""
    return linear.merge(jnp.tanh(linear.project(x, w[0], r, t)), w[1], r, t)


MLPS = Param((M, D, 2 * F), ("experts", "embed", "hidden"), zeros), Param((M, F, D), ("experts", "hidden", "embed"), zeros)
HEADS = Param((M, D, F), ("experts", "embed", None), zeros), Param((M, F, D), ("experts", None, "embed"), zeros)
LAYERS = {
    "mlps": (mlps, MLPS, tables(2, 1)),
    "heads, all on all tokens": (heads, HEADS, tables(4, 4)),
    "heads, sorted": (heads, HEADS, tables(1, 1)),
}


def sending(*shape: int) -> MeshConfig:
    return MeshConfig(*shape, dispatch="all-to-all")


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, which CPUs have not: by gathering everything."""
    assert operand.shape[1:] == output.shape[1:] and operand.dtype == output.dtype
    rows, begin, size, into = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me, at = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(rows.shape[0]):
        nth = at - into[sender, me]
        received = rows[sender][begin[sender, me] + nth]
        output = jnp.where(((nth >= 0) & (nth < size[sender, me])).reshape(-1, *(1,) * (output.ndim - 1)), received, output)
    agreed = jnp.all(recv_sizes == size[:, me]) & jnp.all(into[:, me] + size[:, me] <= output.shape[0])
    return jnp.where(agreed, output, -(10**6))


RAGGED = mock.patch.object(jax.lax, "ragged_all_to_all", ragged_all_to_all)


@cache
def program(layer: str, cfg: MeshConfig, ragged: bool = False):
    """Output and every gradient of a layer, the taps' too, as a function, and its arguments where they lie on the mesh."""
    f, spec, _ = LAYERS[layer]
    mesh = sharding.make_mesh(cfg)

    def run(w, x, r, t):
        def loss(w, x, weight, t):
            y = f(w, x, r.replace(weight=weight), t)
            return jnp.sum(jnp.tanh(y) * TARGET), y

        layout = sharding.layout(mesh)
        with RAGGED, over(layout and replace(layout, ragged=ragged)):
            (_, y), grads = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(w, x, r.weight, t)
        return y, grads

    params = jax.device_put(jax.device_get(make(spec)), sharding.state_shardings(mesh, spec, spec))
    return jax.jit(run), lambda r: (params, *sharding.shard_batch(mesh, jax.device_get((X, r))), tap.zeros(r))


@pytest.mark.parametrize(
    ("layer", "mesh", "ragged"),
    [
        *((layer, mesh, False) for layer in LAYERS for mesh in (MeshConfig(2, 2, 2), MeshConfig(1, 1, 8), sending(2, 2, 2))),
        ("mlps", sending(1, 1, 8), False),
        ("mlps", sending(1, 1, 8), True),
        ("mlps", MeshConfig(2, 1, 4), False),
        ("mlps", MeshConfig(1, 8, 1), False),
    ],
    ids=str,
)
def test_output_gradients_and_taps_are_those_of_one_device(layer, mesh, ragged):
    (one, at_one), (many, at_many) = program(layer, MeshConfig(1)), program(layer, mesh, ragged=ragged)
    for name, r in LAYERS[layer][2].items():
        want, got = one(*at_one(r)), many(*at_many(r))
        for (path, expected), found in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
            scale = max(np.abs(expected).max(), 1e-6)
            np.testing.assert_allclose(found, expected, 0, 1e-5 * scale, err_msg=f"{name} {jax.tree_util.keystr(path)}")
        assert np.count_nonzero(want[1][3].module) == {"all tokens on one": 1, "none in use": 0}.get(name, M) or "empty" in name


@pytest.mark.parametrize("layer", LAYERS)
def test_one_device_pays_nothing(layer, monkeypatch):
    """On a mesh of one device the program is, word for word, the one of layers that call what they compute directly."""

    def lowered() -> str:
        f, arguments = program.__wrapped__(layer, MeshConfig(1))
        return f.lower(*arguments(LAYERS[layer][2]["idle slots"])).as_text()

    text = lowered()
    monkeypatch.setattr(parallel, "run", lambda f, w, axes, x, r, t, send=False: f(w, x, r, t))
    monkeypatch.setattr(parallel, "fit", lambda r: r)
    assert lowered() == text and "stablehlo.all_" not in text


def test_tokens_that_do_not_divide_are_partitioned_automatically():
    _, spec, _ = LAYERS["mlps"]
    r = jax.tree.map(lambda a: a[:9], LAYERS["mlps"][2]["idle slots"])
    w, x = make(spec), X[:9]

    def run(w, x, r):
        with over(sharding.layout(sharding.make_mesh(MeshConfig(2, 2, 2)))):
            return mlps(w, x, r, None)

    np.testing.assert_allclose(jax.jit(run)(w, x, r), mlps(w, x, r, None), rtol=1e-5, atol=1e-6)


def test_modules_that_do_not_divide_are_partitioned_automatically():
    specs = (Param((6, *p.shape[1:]), p.axes, zeros) for p in MLPS)
    w, rng = make(tuple(specs)), np.random.default_rng(1)
    r = hand_made(rng.integers(0, 6, (N, 2)), rng.normal(size=(N, 2)), np.ones((N, 2), bool), 6, D)

    def surprise(cfg: MeshConfig):
        def loss(t):
            with over(sharding.layout(sharding.make_mesh(cfg))):
                return jnp.sum(jnp.tanh(mlps(w, X, r, t)) * TARGET)

        return jax.jit(jax.grad(loss))(tap.zeros(r))

    for got, want in zip(jax.tree.leaves(surprise(MeshConfig(2, 1, 4))), jax.tree.leaves(surprise(MeshConfig(1))), strict=True):
        np.testing.assert_allclose(got, want, 0, 1e-5 * np.max(want))


def test_a_part_of_a_routing_by_hand():
    whole = hand_made([[0, 2], [3, 1]], [[0.1, 0.2], [0.3, 0.4]], [[True, True], [True, False]], 4)
    mine = routing.part(whole, jnp.int32(2), 2)
    np.testing.assert_array_equal(mine.active, [[False, True], [True, False]])
    np.testing.assert_array_equal(np.where(mine.active, mine.index, -1), [[-1, 0], [1, -1]])
    np.testing.assert_allclose(mine.weight, [[0, 0.2], [0.3, 0]])
    np.testing.assert_array_equal(mine.logits, whole.logits[:, 2:])
    assert (mine.config.modules, mine.config.groups, mine.config.slots_per_group) == (2, 1, 2)


# Four tokens on each of two devices, a module each. Room for two from one to another: 0.8 × 4 pairs / 2 devices, rounded up.
CROWD = [[0], [0], [0], [1], [1], [1], [1], [1]]
USED = [[True], [True], [True], [True], [True], [False], [True], [True]]
LATE = [[False], [False], [True], [False], [False], [False], [False], [True]]


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_what_finds_no_room_is_dropped_and_counted(ragged):
    w = make(tuple(Param((2, *p.shape[1:]), p.axes, zeros) for p in MLPS))
    x, r = X[:8], hand_made(CROWD, np.ones((8, 1)), USED, 2, D)
    layout = sharding.layout(sharding.make_mesh(sending(1, 1, 2)), capacity=0.8)

    def loss(w, x, weight, t, limit):
        with over(replace(layout, ragged=ragged) if limit else None):
            active = r.active if limit else r.active & ~np.array(LATE)
            fitted = parallel.fit(r.replace(weight=jnp.where(active, weight, 0), active=active))
            y = experts.routed_mlp(experts.Mlp(*w), x, fitted, True, t)
        return jnp.sum(jnp.sin(y)), (y, fitted.dropped)

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), static_argnums=4)
    with RAGGED:
        ((_, (y, dropped)), got), ((_, (want, none)), grads) = (
            both(w, x, r.weight, tap.zeros(r), limit) for limit in (True, False)
        )
    np.testing.assert_array_equal(dropped, LATE)
    assert none is None
    lost = np.ravel(LATE)
    assert not np.any(y[lost]) and np.all(np.any(np.asarray(y)[np.ravel(USED) & ~lost], 1))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    found = jax.jit(signals.summary)(r.replace(dropped=dropped), signals._signals(got[3], r), jnp.zeros(2))
    assert found["dropped"] == pytest.approx(2 / 7)
    # Whoever is dropped has no surprise and causes none; all others as if it had been idle.
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5 * float(np.abs(b).max()))
    assert np.abs(grads[3].param).min() == 0 < np.abs(grads[3].param).max()


def test_sending_without_a_count_is_refused():
    r = LAYERS["mlps"][2]["idle slots"]
    with over(sharding.layout(sharding.make_mesh(sending(2, 2, 2)))), pytest.raises(ValueError, match=r"parallel\.fit"):
        experts.routed_mlp(experts.Mlp(*make(MLPS)), X, r, True)


def test_tokens_are_sent_and_nothing_is_added_up_over_modules():
    """Rows go to their modules and come back, and their gradients again; nothing else of a token's width moves."""
    f, arguments = program("mlps", sending(1, 1, 8))
    text = f.lower(*arguments(LAYERS["mlps"][2]["all in use"])).compile().as_text()
    wide = [c for c in hlo.read(text, 8).collectives if any(len(s) > 1 and s[-1] in (D, F, 2 * F) for s in c.shapes)]
    assert [c.kind for c in wide] == ["all-to-all"] * 4
    room = N // 8 * 2  # for all pairs of a device, as no capacity is set
    assert {c.payload for c in wide} == {8 * room * D * 4}


def test_on_a_tpu_only_what_goes_is_sent():
    """Lowered for TPUs, not run: rows and their outputs go raggedly, and in the backward pass their gradients; so do the numbers
    of their modules. All at once go only the sizes of queues."""
    layout = sharding.layout(sharding.make_mesh(sending(1, 1, 8)))
    assert not layout.ragged  # there is no such operation on CPUs
    r = LAYERS["mlps"][2]["all in use"]
    with over(replace(layout, ragged=True)):
        both = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(mlps(w, x, r, None))), (0, 1)))
        text = both.trace(make(MLPS), X).lower(lowering_platforms=("tpu",)).as_text()
    sent = [line for line in text.splitlines() if "@ragged_all_to_all" in line]
    assert sorted(f"x{D}xf32" in line for line in sent) == [False] + 4 * [True]
    assert "stablehlo.all_to_all" in text and f"x{D}xf32" not in "".join(
        line for line in text.splitlines() if "stablehlo.all_to_all" in line
    )
