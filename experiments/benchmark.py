"""The ratios this project promises, measured: `python experiments/benchmark.py [--only NAME …] [--json FILE]`.

`benchmark.py scaling` predicts how a step scales over devices (see scaling.py).
`benchmark.py gpu` measures what needs a GPU, and checks first that it computes the right thing there (see gpu.py).

Ratios are taken in one process, runs interleaved in random order, medians, in CPU time on a CPU (`time.process_time`) and wall
time elsewhere; the row `noise` is one function against itself. A row is ok when its value keeps its limit.
"""

import argparse
import dataclasses
import importlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from measure import Row, add_json, machine, medians, plain_step, random_batch, report, whole_step
from rich.console import Console

from tinyonn_jax import cli, host
from tinyonn_jax.arc.batches import batch_at, build_dataset
from tinyonn_jax.arc.sets import load_task_sets
from tinyonn_jax.config import LearningConfig, ModelConfig
from tinyonn_jax.layers import base, experts
from tinyonn_jax.layers import grouped as grouped_matmul
from tinyonn_jax.layers.routing import RouterConfig, per_module, route
from tinyonn_jax.layers.routing import spec as router_spec
from tinyonn_jax.models import transformer
from tinyonn_jax.models.flops import useful_flops
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, optim
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.step import init_state, make_train_step

host.tune()  # as the experiments do


def noise() -> Iterator[Row]:
    """One step against itself."""
    batch = random_batch(8, 128)
    run, _ = whole_step(ModelConfig(), batch)
    m = medians({"a": run, "b": run})
    yield Row("noise: a step ÷ itself", m["a"] / m["b"], 1.05)


def signals() -> Iterator[Row]:
    """All signals and SARS against the plain step."""
    batch = random_batch(16, 128)
    for e in (8, 32):
        model = ModelConfig(experts=e, depth=4)
        m = medians({"signals": whole_step(model, batch)[0], "plain": plain_step(model, batch)})
        yield Row(f"signals: step with signals and SARS ÷ plain step, E={e}", m["signals"] / m["plain"], 1.05)


def presets() -> Iterator[Row]:
    """The same at the size of every preset, in float32: as many tokens as a batch of it has, or 512."""
    found: dict[ModelConfig, list[str]] = {}
    for name, (_, config) in PRESETS.items():
        found.setdefault(dataclasses.replace(config.model, dtype="float32"), []).append(name)
    for model, names in found.items():
        data, large = PRESETS[names[0]][1].data, model.dim > 512
        length = min(max(data.buckets), 128)
        batch = random_batch(min(data.tokens_per_batch, 512 if large else 2048) // length, length)
        m = medians({"signals": whole_step(model, batch)[0], "plain": plain_step(model, batch)}, repeats=5 if large else 21)
        yield Row(f"presets: step with signals and SARS ÷ plain step, {', '.join(names)}", m["signals"] / m["plain"], 1.03)


def _experts(e: int, n: int = 2048, d: int = 256, f: int = 256) -> tuple[Any, Any, Any, Callable[[Any, Any], Any]]:
    """Parameters of e experts, tokens, their routing with two slots, and a loss of what the experts make of them."""
    cfg, x = RouterConfig(modules=e, slots=2), jax.random.normal(jax.random.key(0), (n, d))
    params = base.init(jax.random.key(1), experts.mlp_spec(d, f, False, e))
    routing = route(base.init(jax.random.key(2), router_spec(d, cfg)), x, cfg)
    return params, x, routing, lambda params, x: jnp.sum(experts.routed_mlp(params, x, routing, False) ** 2)


def grouped() -> Iterator[Row]:
    """Dropless grouped experts against every expert on every token under a mask: forward and backward."""
    for e, limit in ((8, 0.40), (32, 0.12), (128, 0.08)):
        params, x, routing, routed = _experts(e)
        weight = per_module(routing.weight, routing)

        def dense(params, x, weight=weight):
            h = jax.nn.silu(jnp.einsum("nd,edf->enf", x, params.w_in))
            return jnp.sum(jnp.einsum("enf,efd,ne->nd", h, params.w_out, weight) ** 2)

        a, b = jax.jit(jax.grad(routed, (0, 1))), jax.jit(jax.grad(dense, (0, 1)))
        m = medians({"grouped": partial(a, params, x), "dense": partial(b, params, x)}, repeats=5)
        yield Row(f"grouped: dropless ÷ dense with mask, E={e}, K=2", m["grouped"] / m["dense"], limit)


def library() -> Iterator[Row]:
    """Larger libraries at the same active compute."""
    batch = random_batch(16, 128)
    for small, large, limit in ((8, 128, 2.0), (16, 1024, 2.5)):
        m = medians({str(e): whole_step(ModelConfig(experts=e), batch)[0] for e in (small, large)}, repeats=5)
        yield Row(f"library: step at E={large:,} ÷ E={small}, K=2", m[str(large)] / m[str(small)], limit)


def capacity() -> Iterator[Row]:
    """Dropless grouped experts against a batched einsum of 1.25 times the mean load, which drops tokens: forward and backward."""
    for e in (8, 32, 128):
        params, x, routing, dropless = _experts(e)
        (n, d), k = x.shape, routing.slots.shape[-1]
        room = -(-5 * n * k // (4 * e))

        def capped(params, x, routing=routing, e=e, n=n, d=d, k=k, room=room):
            plan = grouped_matmul.plan(routing.slots, routing.active, e)
            module = routing.slots.reshape(-1)
            rank = plan.inverse - (jnp.cumsum(plan.sizes) - plan.sizes)[module]
            place = jnp.where(rank < room, module * room + rank, -1)
            nowhere = jnp.where(place < 0, e * room, place)  # past the end: dropped
            pair = jnp.full(e * room, -1).at[nowhere].set(jnp.arange(n * k), mode="drop")
            rows = grouped_matmul.move(jnp.repeat(x, k, 0), pair, place).reshape(e, room, d)
            h = jax.nn.silu(jnp.einsum("erd,edf->erf", rows, params.w_in))
            y = grouped_matmul.move(jnp.einsum("erf,efd->erd", h, params.w_out).reshape(-1, d), place, pair)
            return jnp.sum(jnp.einsum("nkd,nk->nd", y.reshape(n, k, d), routing.weight) ** 2)

        a, b = jax.jit(jax.grad(dropless, (0, 1))), jax.jit(jax.grad(capped, (0, 1)))
        m = medians({"dropless": partial(a, params, x), "capped": partial(b, params, x)})
        yield Row(f"capacity: dropless ÷ einsum of capacity 1.25, E={e}, K=2", m["dropless"] / m["capped"], 1.3)


def rate() -> Iterator[Row]:
    """The whole `dyntrm` step's FLOP/s against those of a plain matmul, on as many threads."""
    batch, a = random_batch(16, 128), jnp.ones((1024, 1024))
    matmul = jax.jit(jnp.matmul)
    for model, name in ((ModelConfig(), "D=128"), (ModelConfig(dim=512, heads=8, head_dim=64, expert_hidden=512), "D=512")):
        m = medians({"step": whole_step(model, batch)[0], "matmul": lambda: matmul(a, a)})
        achieved = useful_flops(model, batch.length, batch.prefix) / m["step"] / (2 * 1024**3 / m["matmul"])
        yield Row(f"rate: dyntrm step, {name}, FLOP/s ÷ those of a matmul", achieved, 0.5, least=True)


def memory() -> Iterator[Row]:
    """Temporaries of the compiled step, with remat."""
    batch = random_batch(16, 128)
    size = {}
    for r in (1, 8):
        _, program = whole_step(ModelConfig(depth=r, remat=True), batch)
        size[r] = program.memory_analysis().temp_size_in_bytes
    yield Row("memory: temporaries at R=8 ÷ R=1, remat", size[8] / size[1], 2.0)


def large() -> Iterator[Row]:
    """The size at which an earlier PyTorch implementation took 8.2 s and 6.7 GB on two cores."""
    model = ModelConfig(dim=512, heads=8, head_dim=64, latent_heads=64, experts=16, expert_hidden=512, active_experts=2, depth=7)
    run, program = whole_step(model, random_batch(1, 254))
    yield Row("large: D=512, 8 × 8 heads, 16 experts, R=7, 254 tokens", medians({"a": run}, 5, time.perf_counter)["a"], 0.6, "s")
    m = program.memory_analysis()
    yield Row("large: state and temporaries", (m.argument_size_in_bytes + m.temp_size_in_bytes) / 1e9, 1.2, "GB")


def neurons() -> Iterator[Row]:
    """Routed neurons against the plain step: hard gating with signals alone and with SARS, soft gating with all of M-SAPS."""
    batch = random_batch(16, 128)
    for kind, limits in (("dfc_hard", {"none": 1.10, "sars": 1.10}), ("dfc", {"msaps": 1.20})):
        model = ModelConfig(kind=kind, recursed=False)  # pyright: ignore[reportArgumentType]
        m = medians({rule: whole_step(model, batch, rule)[0] for rule in limits} | {"plain": plain_step(model, batch)})
        for rule, limit in limits.items():
            what = "all signals" if rule == "none" else f"all signals and {rule}"
            yield Row(f"neurons: {kind} step with {what} ÷ plain step", m[rule] / m["plain"], limit)


def large_neurons() -> Iterator[Row]:
    """The size at which an earlier PyTorch implementation took 0.27 s and 1.06 GB on two cores."""
    model = ModelConfig(kind="dfc_hard", dim=504, heads=1, head_dim=504, hidden=0, depth=6, recursed=False, task_embedding=False)
    run, program = whole_step(model, random_batch(1, 254))
    seconds = medians({"a": run}, 5, time.perf_counter)["a"]
    count = assemble.count_parameters(transformer.spec(model, 1))["total"] / 1e6
    yield Row(f"large neurons: dfc_hard, D=504, 6 layers, 1 head, {count:.1f} M parameters, 254 tokens", seconds, 0.22, "s")
    m = program.memory_analysis()
    yield Row("large neurons: state and temporaries", (m.argument_size_in_bytes + m.temp_size_in_bytes) / 1e9, 0.8, "GB")


def decoding() -> Iterator[Row]:
    """Greedy decoding of 400 tokens with the cache, against running the whole sequence again for every token."""
    model, prompt, new = ModelConfig(depth=4), 100, 400
    params = base.init(jax.random.key(0), transformer.spec(model, 1))
    batch = random_batch(1, prompt + new)
    zero = jnp.zeros(1, jnp.int32)

    @jax.jit
    def cached(params, tokens):
        cache = transformer.init_cache(model, 1, prompt + new)
        ids = (batch.prefix, batch.task, batch.dihedral, model)
        logits, cache = transformer.decode(params, cache, tokens[:, :prompt], batch.positions[:, :prompt], zero, *ids)

        def body(i, carry):
            token, cache = carry
            at = jnp.full(1, prompt + i)
            here = jax.lax.dynamic_slice_in_dim(batch.positions, prompt + i, 1, 1)
            logits, cache = transformer.decode(params, cache, token[:, None], here, at, *ids)
            return jnp.argmax(logits[:, 0], -1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, new, body, (jnp.argmax(logits[:, -1], -1).astype(jnp.int32), cache))[0]

    @jax.jit
    def uncached(params, tokens):
        def body(i, tokens):
            logits = transformer.apply(params, dataclasses.replace(batch, tokens=tokens), model).logits
            token = jnp.argmax(logits[0, prompt + i - 1]).astype(jnp.int32)
            return tokens.at[0, prompt + i].set(token)

        return jax.lax.fori_loop(0, new, body, tokens)

    m = medians({"cached": lambda: cached(params, batch.tokens), "uncached": lambda: uncached(params, batch.tokens)}, repeats=2)
    yield Row("decoding: cached ÷ uncached, 400 tokens", m["cached"] / m["uncached"], 0.05)


def data() -> Iterator[Row]:
    """`batch_at` on one core."""
    dataset = build_dataset(load_task_sets(PRESETS["laptop"][1].data), PRESETS["laptop"][1].data)
    batch_at(dataset, 0, 0)
    start, count, steps = time.process_time(), 0, 400
    for step in range(steps):
        count += batch_at(dataset, 0, step).tokens.size
    yield Row("data: batch_at, laptop", count / (time.process_time() - start) / 1e6, 3.0, "M tokens/s", least=True)


def start() -> Iterator[Row]:
    """Process start to first step with a warm compilation cache."""
    script = str(Path(__file__).with_name("arc.py"))
    seconds = 0.0
    for _ in range(2):  # the first run fills the cache
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--preset", "laptop", "--workdir", folder, "--train.steps", "1", "--train.log-every", "1"]
            subprocess.run([sys.executable, script, "train", *flags], check=True, capture_output=True)
            seconds = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    yield Row("start: process start to first step, laptop, warm cache", seconds, 15.0, "s")


def throughput() -> Iterator[Row]:
    """Padded tokens per second of training, both cores: laptop shapes, recursed dense block."""
    preset = PRESETS["laptop"][1]
    config = dataclasses.replace(preset, model=ModelConfig(kind="dense", dim=128, depth=4), learning=LearningConfig(rule="none"))
    dataset = build_dataset(load_task_sets(config.data), config.data)
    rule = make_rule(config)
    loss, tx = make_loss(config, rule), optim.make_optimizer(config.optim, config.train.steps)
    params = base.init(jax.random.key(0), transformer.spec(config.model, 200))
    batches = [batch_at(dataset, 0, i) for i in range(40)]
    state = init_state(loss, rule, tx, params, batches[0])
    step = make_train_step(loss, rule, tx, config.optim.ema)
    for batch in batches:  # compiles every bucket
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        for batch in batches:
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        taken.append(time.perf_counter() - begin)
    rate = sum(batch.tokens.size for batch in batches) / statistics.median(taken)
    yield Row("throughput: padded tokens/s, laptop, dense recursed d=128 R=4", rate, 16_000, "tokens/s", least=True)


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    f.__name__: f
    for f in (
        noise,
        signals,
        presets,
        grouped,
        capacity,
        library,
        rate,
        memory,
        large,
        neurons,
        large_neurons,
        decoding,
        data,
        start,
        throughput,
    )
}


COMMANDS = ("gpu", "scaling")
"""First words of the command line: modules beside this file, whose `main(arguments)` runs."""


def _measured(names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        for row in ROWS[name]():
            yield row
            jax.clear_caches()


def main() -> None:
    """Measures the chosen rows, prints a table, writes JSON; exit status 1 if a row misses its limit."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        importlib.import_module(sys.argv[1]).main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows_help = "; ".join(f"{name}: {(f.__doc__ or '').rstrip('.')}" for name, f in ROWS.items())
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help=rows_help)
    add_json(parser)
    args = parser.parse_args()
    Console().print(machine())
    sys.exit(not report(_measured(dict.fromkeys(args.only)), args.json))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, cli.interrupted)
    cli.leave(cli.guard(main))
