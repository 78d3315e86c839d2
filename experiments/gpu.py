"""What needs a GPU, in one run: `python experiments/benchmark.py gpu [--json FILE] [--minutes N] [--tiny]`.

First correctness: every kernel of the grouped matmul against float64 loops, cuDNN's attention against the plain path, a step's
gradients and signals against the CPU's. Then speed: signals against the plain step, the share of the device's peak in training
preset `arc1`, evaluation, and experts against a dense matmul of the same active work. What there is no time for is said to be
not measured. `--tiny` shrinks everything, to try the script itself without a GPU.

Letters: N tokens, D model, F expert hidden, E experts, K slots, P = N·K pairs, B sequences, T positions.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Row, add_json, machine, medians, plain_step, random_batch, report, whole_step

from tinyonn_jax.arc.evaluate import evaluate
from tinyonn_jax.arc.sets import load_task_sets
from tinyonn_jax.arc.tasks import Task
from tinyonn_jax.config import Config, EvalConfig, ModelConfig
from tinyonn_jax.layers import attention, base, experts, grouped, kernels
from tinyonn_jax.layers.routing import RouterConfig, route
from tinyonn_jax.layers.routing import spec as router_spec
from tinyonn_jax.models import transformer
from tinyonn_jax.models.flops import useful_flops
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, sharding
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.step import gradients

PEAK = {"H100 PCIe": 756e12, "NVL": 835e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, the first that fits, from data sheets."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    parity: tuple[int, int, int] = (4096, 384, 16)  # P, D, E
    attention: tuple[int, int] = (4, 512)  # B, T
    experts: tuple[int, int] = (65_536, 1024)  # N, D = F
    libraries: tuple[int, ...] = (16, 64)
    model: ModelConfig = PRESETS["arc1"][1].model
    batch: tuple[int, int] = (32, 512)
    evaluation: tuple[int, int, int, int, int] = (8, 300, 256, 512, 64)  # tasks, views, prompt bucket, side by side, tokens


TINY = Sizes(
    parity=(128, 24, 4),
    attention=(2, 16),
    experts=(128, 16),
    libraries=(4,),
    model=replace(PRESETS["smoke"][1].model, depth=1),
    batch=(2, 32),
    evaluation=(2, 3, 48, 4, 2),
)


def peak() -> float | None:
    """FLOP/s that the device could do in bfloat16; None if not known."""
    kind = jax.devices()[0].device_kind
    return next((rate for name, rate in PEAK.items() if name in kind), None)


def distance(got: Any, want: Any) -> float:
    """The largest relative error ‖got − want‖ / ‖want‖ over all arrays."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(one, got, want)), default=0.0)


def attempt(row: str, limit: float | None, measure: Callable[[], float], **fields: Any) -> Row:
    """The row of a measurement, or of why there is none."""
    try:
        return Row(row, float(measure()), limit, **fields)
    except Exception as error:  # a kernel that a device does not run must not end the rows after it
        return Row(row, None, limit, error=_line(error), **fields)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:100]}".splitlines()[0]


def usable() -> list[kernels.Kernel]:
    """The kernels whose packages are here."""
    found: list[kernels.Kernel] = []
    for kernel in kernels.TITLES:
        try:
            kernels.load(kernel)
            found.append(kernel)
        except ImportError:
            pass
    return found


# --- correctness ---------------------------------------------------------------------------------------------------------


def parity(sizes: Sizes) -> Iterator[Row]:
    """Values, gradients and norms of every kernel, where one module has no rows and some rows no module, and where all rows are
    one module's."""
    pairs, dim, modules = sizes.parity
    rng = np.random.default_rng(0)
    share = rng.multinomial(pairs - pairs // 16, rng.dirichlet(np.ones(modules - 1)))
    loads = {"uneven": np.insert(share, 1, 0), "all in one": pairs * (np.arange(modules) == 1)}
    types = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
    for (load, counts), (dtype, limit) in itertools.product(loads.items(), types.items()):
        x, w, g = (jnp.asarray(rng.normal(size=s), dtype) for s in ((pairs, dim), (modules, dim, dim), (pairs, dim)))

        def run(x, w, g, counts=counts):
            tap = grouped.Tap(jnp.zeros(x.shape[0]), jnp.zeros(w.shape[0]))
            y, vjp = jax.vjp(lambda x, w, tap: grouped.matmul(x, w, jnp.asarray(counts), tap), x, w, tap)
            dx, dw, tap = vjp(g)
            return y, dx, dw, tap.rows, tap.modules

        x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
        want = loops(x64, w64, g64, counts)
        for kernel in usable():

            def measure(kernel: kernels.Kernel = kernel, args=(x, w, g), want=want, run=run):
                with grouped.using(kernel), jax.default_matmul_precision("highest"):
                    return distance(jax.jit(partial(run))(*args), want)  # a function of its own: `run` itself is traced once

            yield attempt(f"parity: {kernel}, {load}, {jnp.dtype(dtype).name}, relative error", limit, measure)


def loops(x: np.ndarray, w: np.ndarray, g: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """y, dx, dw and the norms, module by module."""
    y, dx, dw, rows = np.zeros_like(g), np.zeros_like(x), np.zeros_like(w), np.zeros(len(x))
    for m, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        mine = slice(end - size, end)
        y[mine], dx[mine], dw[m] = x[mine] @ w[m], g[mine] @ w[m].T, x[mine].T @ g[mine]
        rows[mine] = np.sum(x[mine] ** 2, 1) * np.sum(g[mine] ** 2, 1)
    return y, dx, dw, rows, np.sum(dw**2, (1, 2))


def attending(sizes: Sizes) -> Iterator[Row]:
    """Attention in bfloat16, causal with prefixes and grouped heads, against the plain path in float32; then its memory."""
    b, t = sizes.attention
    rng = np.random.default_rng(1)
    q, g = (jnp.asarray(rng.normal(size=(b, t, 12, 64)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(b, t, 4, 64)), jnp.bfloat16) for _ in range(2))
    path = "cuDNN" if attention.cudnn_takes(q) else "no cuDNN here"

    def with_gradients(attend, q, k, v, g):
        y, vjp = jax.vjp(attend, q, k, v)
        return y, vjp(g)

    def where(q):
        prefix = jnp.arange(q.shape[0]) * q.shape[1] // q.shape[0]  # none to most of the sequence
        still = jnp.zeros((*q.shape[:2], 1), jnp.int32)  # positions that turn nothing
        return attention.context(still, 64, prefix=prefix)

    def fast(q, k, v):
        return attention.attend(q, k, v, where(q))[0]

    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=attention.mask(where(q), q.shape[1]), implementation="xla")

    def measure():
        with jax.default_matmul_precision("highest"):
            want = jax.jit(partial(with_gradients, plain))(*(a.astype(jnp.float32) for a in (q, k, v, g)))
        return distance(jax.jit(partial(with_gradients, fast))(q, k, v, g), want)

    yield attempt(f"attention: {path}, bfloat16, relative error", 2e-2, measure)

    def temporaries(length: int) -> int:
        args = (jax.ShapeDtypeStruct((b, length, *a.shape[2:]), a.dtype) for a in (q, k, v, g))
        memory: Any = jax.jit(partial(with_gradients, fast)).lower(*args).compile().memory_analysis()
        return memory.temp_size_in_bytes

    name = "attention: temporaries at 8·T ÷ 4·T"
    if attention.cudnn_takes(q):
        yield attempt(name, 2.2, lambda: temporaries(8 * t) / temporaries(4 * t))
    else:
        yield Row(f"{name}: {path}", None, 2.2)


def against_cpu(sizes: Sizes) -> Iterator[Row]:
    """Gradients and signals of one step of a small network in float32, on this device and on the CPU."""
    model = replace(PRESETS["smoke"][1].model, experts=16)
    config = replace(Config(), model=model)
    rule = make_rule(config)
    loss, batch = make_loss(config, rule), random_batch(2, 32)
    params = base.init(jax.random.key(0), transformer.spec(model, 1))
    meta = rule.init(params, jax.eval_shape(loss, params, None, batch)[1].routings)

    def on(device: Any) -> Any:
        args = jax.device_put((params, meta, batch), device)
        with jax.default_matmul_precision("highest"):
            grads, _, signals, _ = jax.jit(lambda *args: gradients(loss, rule, *args))(*args)
        return jax.device_get((grads, signals))

    if jax.default_backend() == "cpu":
        yield Row("step: gradients and signals against the CPU: this is one", None)
        return
    yield attempt(
        "step: gradients and signals against the CPU, relative error",
        1e-3,
        lambda: distance(on(jax.devices()[0]), on(jax.devices("cpu")[0])),
    )


# --- speed ---------------------------------------------------------------------------------------------------------------


def routed(sizes: Sizes) -> Iterator[Row]:
    """Routed experts on each kernel, forward and backward, against one MLP on as many rows as there are pairs, in bfloat16."""
    n, d = sizes.experts
    x = jax.random.normal(jax.random.key(0), (n, d), jnp.bfloat16)
    for e in sizes.libraries:
        cfg = RouterConfig(modules=e, slots=2)
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), base.init(jax.random.key(1), experts.mlp_spec(d, d, False, e)))
        one = jax.tree.map(lambda p: p[0], params)
        routing = route(base.init(jax.random.key(2), router_spec(d, cfg)), x, cfg)

        def sparse(params, x, routing):
            return jnp.sum(experts.routed_mlp(params, x, routing, False).astype(jnp.float32) ** 2)

        def dense(one, rows):
            return jnp.sum(experts.mlp(one, rows, False).astype(jnp.float32) ** 2)

        rows = jnp.repeat(x, 2, 0)
        baseline = jax.jit(jax.grad(dense, (0, 1)))
        base_time = medians({"dense": lambda f=baseline, one=one, rows=rows: f(one, rows)}, 5)["dense"]
        found = []
        for kernel in usable():

            def measure(kernel: kernels.Kernel = kernel, params=params, routing=routing, base_time=base_time):
                with grouped.using(kernel):
                    f = jax.jit(jax.grad(sparse, (0, 1)))
                    return medians({kernel: lambda: f(params, x, routing)}, 3)[kernel] / base_time

            row = attempt(f"experts: {kernel} ÷ dense matmul of the same work, E={e}, K=2", None, measure)
            found.append(row)
            yield row
            jax.clear_caches()
        best = min((row for row in found if row.value is not None), key=lambda row: row.value or 0.0, default=None)
        name, value = (f", {best.row.split()[1]}", best.value) if best else ("", None)
        yield Row(f"experts: the best of these{name}, E={e}", value, 1.25)


def training(sizes: Sizes) -> Iterator[Row]:
    """The whole train step at the size of `arc1`: against the plain step, in tokens a second, as a share of the device's peak."""
    batch = random_batch(*sizes.batch)
    with_signals, without = whole_step(sizes.model, batch)[0], plain_step(sizes.model, batch)
    m = medians({"signals": with_signals, "plain": without}, 5, time.perf_counter)
    yield Row("training: arc1 step with signals and SARS ÷ plain step", m["signals"] / m["plain"], 1.03)
    shape = " × ".join(map(str, sizes.batch))
    yield Row(f"training: arc1, {shape} tokens", batch.tokens.size / m["signals"], unit="tokens/s", least=True)
    rate, known = useful_flops(sizes.model, batch.length, batch.prefix) / m["signals"], peak()
    if known is None:
        yield Row("training: arc1, achieved", rate / 1e12, unit="TFLOP/s", least=True)
    name = "training: arc1, share of the bfloat16 peak" + ("" if known else f", not known for {jax.devices()[0].device_kind}")
    yield Row(name, rate / known if known else None, 0.40, least=True)


def evaluation(sizes: Sizes) -> Iterator[Row]:
    """Greedy decoding of tasks in many views. Parameters are random and end no answer: every one is as long as it may be."""
    count, views, bucket, batch, cap = sizes.evaluation
    preset = PRESETS["smoke" if sizes is TINY else "arc1"][1]
    data = replace(preset.data, buckets=(bucket,), tokens_per_batch=bucket, smallest=count)
    tasks: tuple[Task, ...] = tuple(load_task_sets(data).evaluation)[:count]
    config = replace(Config(), model=sizes.model, data=data, eval=EvalConfig(augmentations=views, batch=batch))
    params = base.init(jax.random.key(0), transformer.spec(sizes.model, count))
    decoder = assemble.make_decoder(config, sharding.make_mesh(config.mesh))
    ids = [task.id for task in tasks]

    def run():
        return evaluate(decoder, params, tasks, ids, data, config.eval, cap=cap)

    run()  # compiles
    begin = time.perf_counter()
    sequences = run().sequences
    rate, known = sequences / (time.perf_counter() - begin), peak()
    name = f"evaluation: {count} tasks in {views} views, prompts up to {bucket}, {cap} tokens each"
    yield Row(name, rate, unit="sequences/s", least=True)
    forward = useful_flops(sizes.model, np.array([bucket + cap]), np.array([bucket])) / 3  # of forward and backward
    yield Row("evaluation: share of the bfloat16 peak, prompts as long as they may be", rate * forward / known if known else None)


SECTIONS: tuple[Callable[[Sizes], Iterator[Row]], ...] = (parity, attending, against_cpu, training, evaluation, routed)


def rows(sizes: Sizes, seconds: float) -> Iterator[Row]:
    """The rows there is time for, and how long they took; a section that fails as a whole is a row that says so."""
    begin = time.perf_counter()
    for section in SECTIONS:
        try:
            measured = section(sizes)
            while time.perf_counter() - begin < seconds:
                yield next(measured)
            yield Row(f"{section.__name__}: no time left", None)
        except StopIteration:
            pass
        except Exception as error:  # the others are worth having
            yield Row(section.__name__, None, 0.0, error=_line(error))
        jax.clear_caches()
    yield Row("all rows together", time.perf_counter() - begin, unit="s")


def main(arguments: Sequence[str]) -> None:
    """Prints the rows, writes JSON; exit status 1 if one misses its limit, or failed."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json(parser)
    parser.add_argument("--minutes", type=float, default=9.0, help="after so many, no further row begins")
    parser.add_argument("--tiny", action="store_true", help="everything small: tries the script")
    args = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        print(f"this is no GPU but a {jax.default_backend()}: its figures say nothing about one")
    print(machine())
    raise SystemExit(not report(rows(TINY if args.tiny else Sizes(), 60 * args.minutes), args.json))
