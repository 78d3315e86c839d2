"""The train step: signals meet the right layer, groups stay apart, bad steps change nothing, devices do not matter."""

from typing import Any, NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.layers.naive import make
from tinyonn_jax.config import OptimConfig
from tinyonn_jax.layers import dynmoe
from tinyonn_jax.layers.routing import RouterConfig
from tinyonn_jax.learning import backprop, msaps, none, sars
from tinyonn_jax.learning.msaps import protection
from tinyonn_jax.learning.rule import initial, without_routers
from tinyonn_jax.training.optim import make_optimizer
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import Aux, _norm, _renewed, gradients, init_state, make_train_step

D = 6
RNG = np.random.default_rng(0)
BATCH: dict[str, Any] = {
    "x": jnp.asarray(RNG.normal(size=(2, 5, D)), jnp.float32),
    "y": jnp.asarray(RNG.normal(size=(2, 5, D)), jnp.float32),
    "root": jnp.float32(1.0),
}
OPTIM = OptimConfig(matrices="adamw", warmup=0.0)


def layer_config(isolate=True):
    return dynmoe.Config(D, 4, RouterConfig(3, 2, isolate=isolate))


def network(order=("a", "b"), isolate=True, say=None):
    """A loss over two routed layers, applied in that order; `say` renames the routings it returns."""

    def loss_fn(params, taps, batch):
        x, routings = batch["x"], {}
        for name in order:
            y, routings[name] = dynmoe.apply(params[name], x, layer_config(isolate), tap=(taps or {}).get(name))
            x = x + y
        x = x @ params["w_head"]
        loss = jnp.mean((x - batch["y"]) ** 2) + jnp.sqrt(batch["root"]) * jnp.sqrt(
            batch["root"] * jnp.sum(params["w_head"] ** 2)
        )
        return loss, Aux(
            {(say or {}).get(n, n): r for n, r in routings.items()}, {"main_acc": jnp.mean(x > 0), "tau": jnp.float32(2.0)}
        )

    return loss_fn


def parameters(order=("a", "b")):
    layer = dynmoe.spec(layer_config())
    made = {"a": make(layer, 1), "b": make(layer, 2)}
    return {name: made[name] for name in order} | {"w_head": make(layer, 3).modules.w_in[0, :, :1] * jnp.eye(D)}


ALONE = ("a",)  # one layer, where a second would only be compiled


def start(rule, tx, order=("a", "b"), params=None):
    params = parameters(order) if params is None else params
    return init_state(network(order, rule.isolate), rule, tx, params, BATCH)


def copy(tree):
    """On the host: a donated state is gone after the step."""
    return jax.tree.map(lambda x: np.array(x), tree)


def collect(rule, loss_fn, params):
    return jax.jit(lambda p, b: gradients(loss_fn, rule, p, initial(p, jax.eval_shape(loss_fn, p, None, b)[1].routings), b))(
        params, BATCH
    )


@pytest.fixture(scope="module")
def with_none():
    return collect(none(), network(), parameters())


@pytest.fixture(scope="module")
def with_sars():
    return collect(sars(), network(), parameters())


def test_main_gradients_are_those_of_the_plain_loss(with_none):
    want = jax.jit(jax.grad(network(), has_aux=True), static_argnums=1)(parameters(), None, BATCH)[0]
    for a, b in zip(jax.tree.leaves(with_none[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-7 * float(jnp.abs(b).max()))


def test_main_loss_teaches_modules_and_meta_loss_routers(with_none, with_sars):
    """Exactly: without a rule no router has a gradient, and with one no module's changes by a bit."""
    for name in ("a", "b"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(with_none[0][name].router))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(with_sars[0][name].router))
        jax.tree.map(np.testing.assert_array_equal, with_none[0][name].modules, with_sars[0][name].modules)
        assert np.any(with_none[0][name].modules.w_in)


def test_signals_follow_their_layer_when_two_are_swapped(with_none):
    """The same function with its two layers under each other's names: signals, loads and gradients swap with them."""
    params = parameters()
    swapped = {**params, "a": params["b"], "b": params["a"]}
    other = collect(none(), network(order=("b", "a")), swapped)
    for part, other_part in zip(with_none[:3], other[:3], strict=True):
        chex.assert_trees_all_close(part["a"], other_part["b"], rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_close(part["b"], other_part["a"], rtol=1e-5, atol=1e-7)
    signals = with_none[2]
    assert np.abs(signals["a"].param - signals["b"].param).max() > 1e-3


def test_names_that_do_not_match_are_refused():
    params = parameters()
    with pytest.raises(ValueError, match=r"\['a', 'c'\].*\['a', 'b'\]"):
        gradients(network(say={"b": "c"}), none(), params, None, BATCH)


@pytest.mark.parametrize(("rule", "isolate"), [(backprop(), True), (sars(), False), (none(), False)])
def test_layers_isolate_their_routers_as_the_rule_needs(rule, isolate):
    """Else `backprop` would teach routers nothing, and `none` would teach them, both without a word."""
    with pytest.raises(ValueError, match=f"layer 'a'.*isolate={rule.isolate}"):
        gradients(network(isolate=isolate), rule, parameters(), None, BATCH)


def test_a_tap_that_is_not_handed_on_is_told_of():
    """Its surprise would be zero, and its router learn nothing, without a word."""
    forgetful = lambda params, taps, batch: network()(params, taps and {"a": taps["a"]}, batch)  # noqa: E731
    with pytest.warns(UserWarning, match="tap of layer 'b'"):
        signals = collect(sars(), forgetful, parameters())[2]
    assert np.any(signals["a"].param) and not np.any(signals["b"].param)


def test_a_layer_may_be_a_plain_dict():
    """The same gradients as for a struct, gated ones too."""

    def loss_fn(params, taps, batch):
        layer = params["layer"]
        layer = dynmoe.Params(**layer, shared=None) if isinstance(layer, dict) else layer
        y, routing = dynmoe.apply(layer, batch["x"], layer_config(), tap=(taps or {}).get("layer"))
        return jnp.mean((y - batch["y"]) ** 2), Aux({"layer": routing}, {})

    made = parameters()["a"]
    rule = sars(goodness_gate=True)
    want = collect(rule, loss_fn, {"layer": made})[0]["layer"]
    got = collect(rule, loss_fn, {"layer": {"router": made.router, "modules": made.modules}})[0]["layer"]
    chex.assert_trees_all_equal(got, {"router": want.router, "modules": want.modules})
    assert np.any(want.router.proto)


def moved(before, after):
    """How far each row, or each module, of a leaf went."""
    return np.linalg.norm(np.asarray(after - before).reshape(len(before), -1), axis=-1)


def test_protected_prototypes_move_less_under_adamw():
    """AdamW gives back what is taken from a gradient, so it is the update that is held back."""
    tx = make_optimizer(OPTIM, 10)
    params, went = parameters(ALONE), {}
    params["a"] = params["a"].replace(router=params["a"].router.replace(gate=jnp.array([0.3, 0.0, 0.1])))
    for protect in (True, False):
        rule = msaps(protect=protect, renew=0.0)
        state, _ = make_train_step(network(ALONE), rule, tx)(start(rule, tx, ALONE, copy(params)), BATCH)
        went[protect] = moved(params["a"].router.proto, state.params["a"].router.proto)
    free = 1 - protection(params["a"].router.gate, jnp.float32(0), 0.5)
    assert free[1] == 0 and 0 < free[2] < free[0] < 1
    np.testing.assert_allclose(went[True], free * went[False], rtol=1e-3)
    assert (went[False] > 0).all()


@pytest.mark.parametrize(("matrices", "order"), [("adamw", ("a", "b")), ("muon", ALONE)], ids=["adamw", "muon"])
def test_modules_that_are_not_good_stand_still_whatever_the_momentum(matrices, order):
    tx = make_optimizer(OptimConfig(matrices=matrices, warmup=0.0, weight_decay=0.0), 100)
    rule, rng = sars(goodness_gate=True), np.random.default_rng(0)
    step = make_train_step(network(order), rule, tx)
    state, seen = start(rule, tx, order), set()
    for _ in range(12):
        before, batch = copy(state.params), BATCH | {"x": jnp.asarray(3 * rng.normal(size=(2, 5, D)), jnp.float32)}
        state, metrics = step(state, batch)
        for layer in order:
            went = moved(before[layer].modules.w_in, state.params[layer].modules.w_in) > 0
            np.testing.assert_array_equal(went, metrics["layers"][layer]["goodness"] > 0)
            seen |= {*went.tolist()}
    assert seen == {True, False}


def test_metrics_of_a_step(with_sars):
    metrics = with_sars[3]
    for name in (
        "main_loss",
        "meta_loss",
        "main_acc",
        "active_share",
        "usage_entropy",
        "max_load",
        "dead_modules",
        "gate_mean",
        "entropy_share",
        "kl",
    ):
        assert np.isfinite(metrics[name]), name
    divergences = sum(float(layer["kl"]) for layer in metrics["layers"].values())
    assert divergences > 0 and float(metrics["elbo"]) == pytest.approx(-float(metrics["main_loss"]) - divergences, rel=1e-6)
    assert float(metrics["active_share"]) == pytest.approx(2 / 3)
    for share in ("good_share", "bad_share", "idle_share"):
        assert float(metrics[share]) == pytest.approx(np.mean([metrics["layers"][n][share] for n in "ab"]), rel=1e-5)
    assert float(sum(metrics[share] for share in ("good_share", "bad_share", "idle_share"))) == pytest.approx(1.0, rel=1e-5)
    gate = parameters()["b"].router.gate
    assert float(metrics["layers"]["b"]["gate_max"]) == pytest.approx(float(gate.max()))
    np.testing.assert_allclose(metrics["layers"]["a"]["load"].sum(), 1, rtol=1e-6)


def test_a_small_norm_beside_a_large_one():
    grads = parameters()
    large = jax.tree.map(lambda g: jnp.full_like(g, 1e3), grads["a"].router)
    grads = jax.tree.map(lambda g: jnp.full_like(g, 1e-4), grads)
    count = sum(leaf.size for leaf in jax.tree.leaves((grads["w_head"], grads["a"].modules, grads["b"])))
    grads = {"w_head": grads["w_head"], "a": grads["a"].replace(router=large), "b": grads["b"].modules}
    count -= sum(leaf.size for leaf in jax.tree.leaves(large))  # b's router is left out as well
    assert float(_norm(without_routers(grads))) == pytest.approx(1e-4 * count**0.5, rel=1e-4)


EMA = 0.5


@pytest.fixture(scope="module", params=[1, 8], ids=["alone", "many"])
def sars_step(request):
    """A compiled step that refuses to be traced twice, as one device runs it, and as each of many does."""
    tx = make_optimizer(OPTIM, 100)
    chex.clear_trace_counter()
    update: Any = chex.assert_max_traces(tx.update, n=1)
    once = optax.GradientTransformationExtraArgs(tx.init, update)  # so that it is handed the norms, as in a run
    with mock.patch.object(jax, "device_count", return_value=request.param):
        yield tx, make_train_step(network(), sars(), once, ema=EMA, pi=(0.1, 2.0))


def test_steps_move_the_average_and_count(sars_step):
    tx, step = sars_step
    state = start(sars(), tx)
    before = copy(state)
    for n in range(3):
        state, metrics = step(state, BATCH)
        after = copy(state)
        decay = min(EMA, (1 + n) / (10 + n))
        want = jax.tree.map(lambda old, p, d=decay: d * old + (1 - d) * p, before.ema, after.params)
        chex.assert_trees_all_close(after.ema, want, rtol=1e-5, atol=1e-7)
        assert int(after.step) == n + 1 and int(after.skipped) == 0 and int(metrics["skipped"]) == 0
        for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
            assert np.any(old != new)
        before = after
    np.testing.assert_allclose(before.meta.records["a"].sum(), 3 * 10 * 2)  # three steps, ten tokens, two slots
    surprise = float(metrics["surprise_output"])
    assert float(metrics["pi"]) == pytest.approx(np.exp(-0.1 * (float(metrics["main_loss"]) / 2.0 + 2.0 * surprise)), rel=1e-5)
    assert float(metrics["ema_acc"]) == pytest.approx(float(before.meta.accuracy))


def test_the_norms_are_those_of_the_groups(sars_step, with_sars):
    tx, step = sars_step
    _, metrics = step(start(sars(), tx), BATCH)
    grads = with_sars[0]
    routers = [grads[n].router for n in "ab"]
    rest = [grads["w_head"], *(grads[n].modules for n in "ab")]
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    assert float(metrics["grad_norm_meta"]) == pytest.approx(norm(routers), rel=1e-4)
    assert float(metrics["grad_norm_main"]) == pytest.approx(norm(rest), rel=1e-4)


@pytest.mark.parametrize(
    "poison",
    [{"x": BATCH["x"].at[0, 0, 0].set(jnp.nan)}, {"y": BATCH["y"] * jnp.inf}, {"root": jnp.float32(0.0)}],
    ids=["input is nan", "loss is infinite", "loss is finite but not its gradient"],
)
def test_a_bad_step_changes_nothing_but_the_counts(sars_step, poison):
    tx, step = sars_step
    state, _ = step(start(sars(), tx), BATCH)
    before = copy(state)
    for n in (1, 2):
        state, metrics = step(state, {**BATCH, **poison})
        assert int(metrics["skipped"]) == n
    assert np.isfinite(metrics["main_loss"]) == ("root" in poison)
    after = copy(state)
    assert (int(after.step), int(after.skipped), int(after.skipped_total)) == (3, 2, 2)
    counts = {name: getattr(before, name) for name in ("step", "skipped", "skipped_total")}
    chex.assert_trees_all_equal(after.replace(**counts), before)
    state, metrics = step(state, BATCH)
    assert int(metrics["skipped"]) == 0  # consecutive ones are counted
    assert np.any(np.asarray(state.params["w_head"]) != before.params["w_head"])


@pytest.mark.parametrize("name", ["none", "backprop"])
def test_rule_none_leaves_routers_bit_identical_and_backprop_moves_them(name):
    rule = {"none": none(), "backprop": backprop(0.1)}[name]
    tx = make_optimizer(OPTIM, 100, frozen_routers=name == "none")
    step = make_train_step(network(ALONE, rule.isolate), rule, tx)
    state = start(rule, tx, ALONE)
    before = copy(state)
    for _ in range(3):
        state, metrics = step(state, BATCH)
    old, new = before.params["a"], copy(state).params["a"]
    assert np.any(old.modules.w_in != new.modules.w_in)
    for a, b in zip(jax.tree.leaves(old.router), jax.tree.leaves(new.router), strict=True):
        assert np.array_equal(a, b) == (name == "none")
    chex.assert_trees_all_equal(copy(state).ema, copy(state).params)  # no averaging asked for
    assert ("loss_balance" in metrics) == (name == "backprop")


def test_parameters_outlive_the_steps_that_start_from_them_whatever_the_optimizer_keeps():
    """States are donated; prodigy keeps the parameters it began with, and `reduce_on_plateau` asks for the loss."""
    params, rule = parameters(ALONE), sars()
    tx = optax.chain(optax.contrib.prodigy(1.0), optax.contrib.reduce_on_plateau())
    step = make_train_step(network(ALONE), rule, tx)
    found = []
    for _ in range(2):
        state, metrics = step(start(rule, tx, ALONE, params), BATCH)
        assert np.isfinite(step(state, BATCH)[1]["main_loss"])
        found.append(float(metrics["main_loss"]))
    assert found[0] == found[1] == network(ALONE)(params, None, BATCH)[0]


def test_what_only_makes_a_rule_is_refused():
    with pytest.raises(TypeError, match=r"sars\(\)"):
        make_train_step(network(), sars, optax.sgd(0.1))  # pyright: ignore[reportArgumentType]


class Two(NamedTuple):
    q: Any
    other: Any


def test_rebirth_resets_the_rows_of_its_own_layer_and_no_others():
    """Layers whose names end alike, in a container with named fields; and an optimizer that keeps sums over rows."""
    layer = make(dynmoe.spec(layer_config()))
    params = {"q": layer, "x": Two(layer, {"w": jnp.ones(3)})}
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_factored_rms(min_dim_size_to_factor=2))
    dead = {"q": jnp.zeros(3, bool), "x.q": jnp.array([True, False, False])}
    state = TrainState.create(params, tx, None)
    dirty = jax.tree.map(lambda a: a + 1.0 if a.dtype == jnp.float32 else a, (state.opt_state, state.ema))
    state = state.replace(opt_state=dirty[0], ema=dirty[1])
    new = _renewed(lambda params, meta, key: (params, meta, dead), state)
    for tree in (new.opt_state[0].mu, new.opt_state[0].nu):
        assert not np.any(tree["x"].q.router.proto[0]) and np.all(tree["x"].q.router.proto[1:]) and np.all(tree["q"].router.proto)
    np.testing.assert_array_equal(new.ema["x"].q.router.proto[0], params["x"].q.router.proto[0])
    assert np.all(new.ema["q"].router.proto != params["q"].router.proto)
    jax.tree.map(np.testing.assert_array_equal, new.opt_state[1], state.opt_state[1])


def test_every_skipped_step_counts_also_after_good_ones(sars_step):
    tx, step = sars_step
    state = start(sars(), tx)
    found = []
    for bad in (False, True, False, True, True, False):
        state, metrics = step(state, BATCH | {"root": jnp.float32(np.nan if bad else 1.0)})
        found.append((int(metrics["skipped"]), int(metrics["skipped_total"])))
    assert found == [(0, 0), (1, 1), (0, 1), (1, 2), (2, 3), (0, 3)]


def test_an_accuracy_of_nothing_is_left_out_of_the_average():
    """A batch in which no token counts would otherwise stop protection, and with it learning, for good."""
    loss_fn, tx = network(ALONE), make_optimizer(OPTIM, 10)

    def counted(params, taps, batch):
        loss, aux = loss_fn(params, taps, batch)
        return loss, aux.replace(metrics=aux.metrics | {"main_acc": aux.metrics["main_acc"] + batch["nothing"]})

    step, state = make_train_step(counted, msaps(), tx), start(msaps(), tx, ALONE)
    for nothing in (0.0, np.nan, 0.0):
        state, metrics = step(state, BATCH | {"nothing": jnp.float32(nothing)})
        assert metrics["ema_acc"] > 0 and metrics["skipped"] == 0


def test_what_a_loss_function_must_return():
    for wrong in (lambda *_: jnp.float32(0), lambda *_: (jnp.float32(0), {})):
        with pytest.raises(TypeError, match=r"Aux\(routings, metrics\)"):
            gradients(wrong, none(), parameters(), None, BATCH)
        with pytest.raises(TypeError, match=r"Aux\(routings, metrics\)"):
            init_state(wrong, none(), make_optimizer(OPTIM, 10), parameters(), BATCH)


def test_a_rule_may_measure_what_it_likes_of_each_layer():
    """Its numbers are averaged over the layers that have them, and cannot stand in for the loss."""
    tx = make_optimizer(OPTIM, 10)
    found = {"layers": {"a": {"one": jnp.float32(1)}, "b": {"two": jnp.float32(2)}}}
    rule = none()._replace(objective=lambda *_: (jnp.float32(0), found))
    metrics = make_train_step(network(), rule, tx)(start(rule, tx), BATCH)[1]
    assert (float(metrics["one"]), float(metrics["two"])) == (1, 2)


def test_metrics_of_the_steps_own_are_not_taken():
    tx = make_optimizer(OPTIM, 10)
    state = start(none(), tx, ALONE)
    for name in ("main_loss", "kl", "layers", "skipped", "pi"):

        def named(params, taps, batch, name=name):
            loss, aux = network(ALONE)(params, taps, batch)
            return loss, aux.replace(metrics=aux.metrics | {name: loss})

        with pytest.raises(ValueError, match=rf"metrics \['{name}'\].*rename"):
            jax.eval_shape(make_train_step(named, none(), tx), state, BATCH)


def test_a_step_passes_the_search_for_nans():
    tx = make_optimizer(OPTIM, 10)
    with jax.debug_nans(True):
        make_train_step(network(ALONE), sars(), tx)(start(sars(), tx, ALONE), BATCH)


@pytest.mark.parametrize("rule", [sars(), msaps()], ids=["sars", "msaps"])
def test_a_state_keeps_its_types_with_parameters_in_float64(rule):
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda v: v.astype(jnp.float64), tree)  # noqa: E731
        tx = make_optimizer(OPTIM, 10)
        state = start(rule, tx, ALONE, double(parameters(ALONE)))
        new, _ = jax.eval_shape(make_train_step(network(ALONE), rule, tx), state, double(BATCH))
        assert state.params["w_head"].dtype == new.ema["w_head"].dtype == jnp.float64
        chex.assert_trees_all_equal_dtypes(new, jax.eval_shape(lambda: state))
