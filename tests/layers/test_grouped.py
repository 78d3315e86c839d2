"""Grouped matmul: every kernel against a naive loop, for every way rows can fall into groups."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.layers.naive import CLOSE
from tinyonn_jax.layers import grouped, kernels
from tinyonn_jax.layers.kernels import ragged

ROWS, MODULES, INPUTS, OUTPUTS = 70, 4, 5, 3  # blocks of 16 to 32 rows: the larger groups below span several
KERNELS = tuple(kernel for kernel in kernels.TITLES if kernel != "tokamax" or importlib.util.find_spec("tokamax"))
SIZES = {
    "even, nothing idle": [18, 17, 18, 17],
    "two empty groups": [40, 0, 25, 0],
    "first and last empty": [0, 3, 60, 0],
    "all in one": [0, 70, 0, 0],
    "all in the last, some idle": [0, 0, 0, 33],
    "one row": [0, 1, 0, 0],
    "all idle": [0, 0, 0, 0],
    "blocks exactly": [24, 32, 0, 6],
}


@partial(jax.jit, static_argnums=0)
def forward_and_back(kernel, x, w, sizes, g):
    tap = grouped.Tap(jnp.zeros(x.shape[0]), jnp.zeros(w.shape[0]))
    with grouped.using(kernel):
        y, vjp = jax.vjp(lambda x, w, tap: grouped.matmul(x, w, sizes, tap), x, w, tap)
        plain, plain_vjp = jax.vjp(lambda x, w: grouped.matmul(x, w, sizes), x, w)
    return y, vjp(g), plain, plain_vjp(g)


def naive(x, w, sizes, g):
    """y, dx, dw, squared norm of every row's own weight gradient, of every module's."""
    x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
    y, dx, dw, rows = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w), np.zeros(len(x))
    for p, m in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[p], dx[p] = x[p] @ w[m], w[m] @ g[p]
        dw[m] += np.outer(x[p], g[p])
        rows[p] = np.sum(np.outer(x[p], g[p]) ** 2)
    return y, dx, dw, rows, np.sum(dw**2, (1, 2))


def numbers(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=s), dtype) for s in ((ROWS, INPUTS), (MODULES, INPUTS, OUTPUTS), (ROWS, OUTPUTS)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_gradients_and_taps(kernel, sizes):
    x, w, g = numbers()
    y, (dx, dw, tap), plain, plain_grads = forward_and_back(kernel, x, w, jnp.asarray(sizes), g)
    for got, want in zip((y, dx, dw, tap.rows, tap.modules), naive(x, w, sizes, g), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
    for tapped, untapped in zip((y, dx, dw), (plain, *plain_grads), strict=True):
        np.testing.assert_array_equal(tapped, untapped)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel, sizes):
    x, w, g = numbers(jnp.bfloat16)
    y, (dx, dw, tap), _, _ = forward_and_back(kernel, x, w, jnp.asarray(sizes), g)
    assert {y.dtype, dx.dtype, dw.dtype} == {jnp.dtype(jnp.bfloat16)} and {tap.rows.dtype, tap.modules.dtype} == {
        jnp.dtype("float32")
    }
    want = naive(x, w, sizes, g)
    for got, expected in zip((y, dx, dw), want[:3], strict=True):  # eight bits of mantissa, once, on sums kept in float32
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=1 / 128, atol=0.03)
    np.testing.assert_allclose(tap.rows, want[3], rtol=1e-5, atol=1e-6)  # statistics are made of float32 numbers
    np.testing.assert_allclose(tap.modules, want[4], rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_idle_rows_may_hold_anything(kernel):
    """What lies past the last group counts for nothing, in the rows that a block spills over too."""
    x, w, g = numbers()
    sizes = np.array(SIZES["all in the last, some idle"])
    bad = jnp.arange(ROWS)[:, None] >= sizes.sum()
    got = forward_and_back(kernel, jnp.where(bad, 1e6, x), w, jnp.asarray(sizes), jnp.where(bad, 1e6, g))
    want = forward_and_back(kernel, x, w, jnp.asarray(sizes), g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


LOADS = {
    "even": [70, 69, 68, 67],
    "even enough": [118, 40, 60, 50],  # beyond room for 88 rows lie 30, which is less than a quarter
    "uneven": [200, 0, 60, 9],
    "uneven, in large blocks": [800, 0, 384, 5],  # two and a rest, none, one exactly, a rest alone
    "even enough, a large block after": [1290, 503, 503, 504],  # beyond room for 880
}


@pytest.mark.parametrize("sizes", LOADS.values(), ids=LOADS.keys())
def test_a_cpu_starts_from_a_batched_matmul_where_the_load_is_even(sizes):
    rng = np.random.default_rng(3)
    rows = sum(sizes) + 11
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((rows, INPUTS), (4, INPUTS, OUTPUTS), (rows, OUTPUTS)))
    x, g = (a.at[sum(sizes) :].set(1e6) for a in (x, g))  # idle rows, which may hold anything
    y, (dx, dw, tap), plain, plain_grads = forward_and_back("loop", x, w, jnp.asarray(sizes), g)
    want = naive(x[: sum(sizes)], w, sizes, g[: sum(sizes)])
    for got, expected in zip((y, dx, dw, tap.rows, tap.modules), want, strict=True):
        np.testing.assert_allclose(got[: len(expected)], expected, rtol=2e-5, atol=2e-5)  # sums of up to 1,290 terms
        assert not np.any(got[len(expected) :])
    for tapped, untapped in zip((y, dx, dw), (plain, *plain_grads), strict=True):
        np.testing.assert_array_equal(tapped, untapped)


def test_more_than_one_tile_each_way():
    """The Pallas kernels' loops over columns and over what is summed, none of them a multiple of the tile."""
    rng = np.random.default_rng(2)
    sizes = [150, 0, 20]
    x, w, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((180, 136), (3, 136, 132), (180, 132)))
    y, (dx, dw, tap), _, _ = forward_and_back("pallas", x, w, jnp.asarray(sizes), g)
    for got, want in zip((y, dx, dw, tap.rows, tap.modules), naive(x, w, sizes, g), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="newer versions lower for a GPU only where there is one")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_lower_for_a_gpu(dtype):
    shapes = ((1000, 96), (8, 96, 200), (8,), (1000, 200))
    x, w, sizes, g = (jax.ShapeDtypeStruct(s, jnp.int32 if s == (8,) else dtype) for s in shapes)
    program = forward_and_back.trace("pallas", x, w, sizes, g).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("xla.gpu.triton") == 6  # y, dx and dw, tapped and not


def test_what_a_ragged_dot_leaves_in_idle_rows_goes_nowhere():
    """That of CPUs leaves zeros; others leave what was there, and sum over it."""
    x, w, g = numbers()
    sizes = jnp.array([3, 0, 5, 1])
    idle = jnp.arange(ROWS)[:, None] >= 9

    def careless(x, w, sizes):
        return jnp.where(idle, jnp.nan, jax.lax.ragged_dot(x, w, sizes))

    def sums(x, g, sizes, **how):
        return jax.lax.ragged_dot_general(x, g, sizes, **how) + jnp.sum(jnp.where(idle, g, 0))

    np.testing.assert_array_equal(ragged.forward(x, w, sizes, careless), ragged.forward(x, w, sizes))
    for tapped in (True, False):
        want, got = ragged.backward(tapped, x, w, sizes, g), ragged.backward(tapped, x, w, sizes, g, careless, sums)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kernel", ("loop", "ragged", "pallas"))
def test_scan_of_checkpoints(kernel):
    """Three applications of shared weights, rematerialised: gradients and per-step taps against dense masks and weight copies."""
    rng = np.random.default_rng(1)
    rows, sizes = 40, jnp.asarray([12, 0, 21])
    x = jnp.asarray(rng.normal(size=(rows, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 4, 4)) * 0.5, jnp.float32)
    taps = grouped.Tap(jnp.zeros((3, rows)), jnp.zeros((3, 3)))

    def scanned(x, w, taps):
        def body(x, tap):
            return jnp.tanh(x + grouped.matmul(x, w, sizes, tap)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, taps)[0] ** 2)

    member = jnp.asarray(np.concatenate([np.repeat(np.arange(3), np.asarray(sizes)), np.full(7, -1)]))

    def dense(x, copies):  # [3 steps, rows, 4, 4]
        for step in range(3):
            x = jnp.tanh(x + jnp.where((member >= 0)[:, None], jnp.einsum("pi,pio->po", x, copies[step]), 0))
        return jnp.sum(x**2)

    dx, dw, tap = jax.jit(grouped.using(kernel)(jax.grad(scanned, (0, 1, 2))))(x, w, taps)
    want_dx, each = jax.jit(jax.grad(dense, (0, 1)))(x, jnp.broadcast_to(w[member], (3, rows, 4, 4)))
    each = np.asarray(each, np.float64)
    per_module = np.stack([each[:, np.asarray(member) == m].sum(1) for m in range(3)], 1)  # [3 steps, M, 4, 4]
    np.testing.assert_allclose(dx, want_dx, **CLOSE)
    np.testing.assert_allclose(dw, per_module.sum(0), **CLOSE)
    np.testing.assert_allclose(tap.rows, np.sum(each**2, (2, 3)), **CLOSE)
    np.testing.assert_allclose(tap.modules, np.sum(per_module**2, (2, 3)), **CLOSE)


def test_a_program_for_gpus_elsewhere_is_padded_blocks():
    """Pallas lowers for a GPU at hand only."""
    x, w, _ = numbers()
    sizes = jnp.ones(MODULES, int)
    lower = jax.jit(lambda *args: grouped.matmul(*args)).trace(x, w, sizes).lower
    programs = {platform: lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    assert "stablehlo.while" in programs["cpu"] and "stablehlo.while" not in programs["cuda"]
    assert "triton" not in programs["cuda"]


def test_the_platform_has_a_kernel_unless_one_is_chosen():
    def loops() -> bool:
        x, w, _ = numbers()
        return "stablehlo.while" in jax.jit(lambda *args: grouped.matmul(*args)).lower(x, w, jnp.ones(MODULES, int)).as_text()

    assert loops()
    with grouped.using("ragged"):
        assert not loops()
        with grouped.using("auto"):
            assert loops()
    assert grouped.title("auto", "cpu") == "block loop" and grouped.title("auto", "tpu") == "lax.ragged_dot"
    assert grouped.title("auto", "gpu") == grouped.title("pallas", "cpu") == "Pallas kernel (Triton)"


make_plan = jax.jit(grouped.plan, static_argnums=2)


@pytest.mark.parametrize("modules", [5, grouped.COUNTED + 1], ids=["counted", "compared"])
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_plan_is_a_stable_sort_with_idle_pairs_last(modules, seed, share):
    rng = np.random.default_rng(seed)
    index, active = rng.integers(0, modules, (9, 2)).astype(np.int32), rng.random((9, 2)) < share
    p = make_plan(index, active, modules)
    key = np.where(active, index, modules).reshape(-1)
    np.testing.assert_array_equal(p.order, np.argsort(key, kind="stable"))
    np.testing.assert_array_equal(np.asarray(p.order)[np.asarray(p.inverse)], np.arange(18))
    np.testing.assert_array_equal(p.sizes, [np.sum(key == m) for m in range(modules)])


def test_dispatch_and_permute_move_rows_there_and_gradients_back():
    rng = np.random.default_rng(0)
    index, active = rng.integers(0, 4, (6, 3)).astype(np.int32), rng.random((6, 3)) < 0.7
    p = make_plan(index, active, 4)
    x = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    weights = rng.normal(size=(18, 2)).astype(np.float32)

    rows = grouped.dispatch(x, p)
    np.testing.assert_array_equal(rows, np.asarray(x)[np.asarray(p.order) // 3])
    np.testing.assert_array_equal(grouped.permute(rows, p.inverse, p.order), np.repeat(x, 3, 0))
    gradient = jax.grad(lambda x: jnp.sum(grouped.dispatch(x, p) * weights))(x)
    want = np.zeros((6, 2))
    for row, pair in enumerate(np.asarray(p.order)):
        want[pair // 3] += weights[row]
    np.testing.assert_allclose(gradient, want, **CLOSE)
    gradient = jax.grad(lambda r: jnp.sum(grouped.permute(r, p.order, p.inverse) * weights))(rows)
    np.testing.assert_array_equal(gradient, weights[np.asarray(p.inverse)])
