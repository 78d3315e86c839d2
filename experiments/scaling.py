"""How a train step scales over devices, predicted: `python experiments/benchmark.py scaling [--devices N …] [--json FILE]`.

The whole step of preset arc1 is compiled for simulated devices at a fixed number of tokens a device (weak scaling), and never
run: its arguments are shapes without arrays. What is read from the compiled program is exact; what follows for real machines is
a prediction. Exit status 1 if a device gathers tokens or the experts of others, or works on larger arrays with others the more
devices there are (of an array that is summed, it sends up to twice as much among many devices as among two).
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, get_args
from unittest import mock

import jax
import numpy as np
from hlo import KINDS, Collective, Reading, read
from jax.sharding import NamedSharding
from measure import json_file
from rich.console import Console
from rich.table import Table

from tinyonn_jax.arc.batches import Batch
from tinyonn_jax.config import Config, Dispatch, MeshConfig
from tinyonn_jax.layers import base
from tinyonn_jax.models import transformer
from tinyonn_jax.models.flops import step_flops
from tinyonn_jax.observe.files import write_atomically
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, sharding

DEVICES = (1, 2, 4, 8, 16, 32, 64)
ROWS, LENGTH, TASKS = 8, 1920, 1000  # of arc1's longest bucket, so many sequences a device as its tokens_per_batch holds
FLAT = 0.02  # by how much the bytes in a device's collectives may grow with `data`, over the fewest devices with every mesh axis


# --- the step, compiled -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figures:
    """One row: how the devices are split, and what each of them does in a step. Bytes; `formula` and `done` are FLOPs."""

    mesh: MeshConfig
    formula: float
    done: float
    cost_analysis: float
    state: int
    temporaries: int
    reading: Reading

    @property
    def devices(self) -> int:
        """All of them."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.expert


def split(devices: int, dispatch: Dispatch = "replicate") -> MeshConfig:
    """fsdp 2 from two devices on, expert 2 from four on; the rest is data.

    Raises:
        ValueError: more than two devices, and not a multiple of four.
    """
    if devices in (1, 2):
        return MeshConfig(1, devices, 1)
    if devices < 1 or devices % 4:
        raise ValueError(f"--devices must be 1, 2 or multiples of 4, got {devices}")
    return MeshConfig(devices // 4, 2, 2, dispatch=dispatch)


def abstract_batch(mesh: Any, rows: int, length: int) -> Any:
    """A batch as shapes, rows split over the devices."""
    lies = NamedSharding(mesh, sharding.rows(mesh))

    def array(*shape: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=lies)

    mask = array(length, dtype=np.float32)
    return Batch(array(length), array(length, 3), array(), array(), mask, array(), array())  # pyright: ignore[reportArgumentType]


def measure(config: Config, mesh_cfg: MeshConfig, rows: int = ROWS, length: int = LENGTH) -> Figures:
    """The whole train step of a configuration with `rows` sequences a device, compiled.

    Raises:
        ValueError: it gathers what it must not (see `forbidden`), or talks in loops of unknown length.
    """
    config = dataclasses.replace(config, mesh=mesh_cfg)
    mesh = sharding.make_mesh(mesh_cfg)
    batch = abstract_batch(mesh, rows * mesh.size, length)
    program = assemble.assemble(config, mesh, TASKS, batch)
    # Recursions as a loop, which a CPU would unroll: then its compiler keeps three times the temporaries.
    with mock.patch.object(transformer, "_unroll", return_value=1):
        compiled: Any = program.step.lower(program.like, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    reading = read(compiled.as_text(), mesh.size)
    if reading.unknown:
        raise ValueError(f"{mesh_cfg}: {reading.unknown} collectives in loops of unknown length")
    alike = 1 if mesh_cfg.dispatch == "all-to-all" else mesh_cfg.expert  # devices that have the same tokens
    if found := forbidden(reading, program.spec, config, rows * alike, length):
        raise ValueError(f"{mesh_cfg}: {found}")
    memory = compiled.memory_analysis()
    flops = step_flops(config.model, rows * length, rows * length**2)
    return Figures(
        mesh=mesh_cfg,
        formula=sum(flops),
        done=reading.flops + flops.routed,  # which the text does not tell
        cost_analysis=compiled.cost_analysis()["flops"],
        state=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        reading=reading,
    )


def forbidden(reading: Reading, spec: Any, config: Config, rows: int, length: int) -> str:
    """What is gathered that should not be, in words: tokens (of `rows` sequences on each device), or weights of modules from
    devices that hold others (over `expert`, the innermost axis), whole or cut over fsdp, whatever shape they have by then.

    Where experts are sent tokens, latent heads are gathered on purpose; experts are told from them by their hidden axis.
    """
    of_all = "hidden" if config.mesh.dispatch == "all-to-all" else "experts"
    params = jax.tree.leaves(spec, is_leaf=base.is_param)
    sizes = lambda params: {math.prod(p.shape) // cut for p in params for cut in (1, config.mesh.fsdp)}  # noqa: E731
    weights = sizes(p for p in params if {"experts", of_all} <= set(p.axes))
    weights -= sizes(p for p in params if "experts" not in p.axes)  # which may be gathered: of these sizes nothing can be told
    for c in (c for c in reading.collectives if c.kind == "all-gather"):
        assert c.axis is not None
        of_others = any(len({device % config.mesh.expert for device in group}) > 1 for group in c.groups)
        for shape in c.shapes:
            size, n = shape[c.axis], len(c.groups[0])
            if size == n * rows * length or (size == n * rows and length in shape[c.axis + 1 :]):
                return f"tokens are gathered: {shape} along axis {c.axis}"
            if of_others and math.prod(shape) in weights:
                return f"the weights of all modules are gathered: {shape}"
    return ""


def flat(rows: Sequence[Figures]) -> str:
    """In words, how what devices work on together grows among the rows that have every mesh axis; empty if it does not."""
    whole = [row for row in rows if min(row.mesh.data, row.mesh.fsdp, row.mesh.expert) > 1]
    for row in whole[1:]:
        before, now = whole[0].reading.payload(), row.reading.payload()
        if now > before * (1 + FLAT):
            return f"bytes in collectives grow from {before:,} on {whole[0].devices} devices to {now:,} on {row.devices}"
    return ""


# --- what follows for real machines -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """Peak FLOP/s in bfloat16; bytes/s a device sends within `island` devices, and beyond."""

    name: str
    peak: float
    island: int
    near: float
    far: float


UTILISATION = 0.4
MACHINES = (
    Machine("H100 SXM", 989e12, 8, 450e9, 50e9),
    Machine("TPU v5p", 459e12, 10**9, 200e9, 200e9),
)
ASSUMPTIONS = f"""\
Predicted, not measured. Efficiency is the time of one device over that of a row.
Matmuls run at {UTILISATION} of the peak, collectives at the full speed of their link, as rings without
latency; nothing else costs time, and the load of the experts is even. Of two figures the first lets nothing overlap, the second
hides all communication behind matmuls. H100 SXM: 989 TFLOP/s in bfloat16, dense; NVLink, 450 GB/s each way among eight; beyond
them 400 Gb/s InfiniBand for each GPU, at which a collective that leaves its eight runs as a whole (see
glennklockwood.com/garden/processors/h100 and jax-ml.github.io/scaling-book/gpus). TPU v5p: 459 TFLOP/s; 4,800 Gb/s a chip over
three torus axes, of which a collective uses one (see cloud.google.com/tpu/docs/v5p)."""
READ = """\
All figures per device and step: TFLOPs, MB sent, GB of memory. `formula`: 6 × active parameters × tokens, and attention, for
every recursion, a third more for remat. `program`: the matmuls of the compiled program, those in loops by their trip counts; so
latent heads that go unused, what is computed twice over `expert`, and the optimizer, are in it. The routed matmuls, on CPU a loop
of unknown length and elsewhere ragged_dot, are taken from the formula. Sent: in rings, (n − 1) / n of an array, twice that for an
all-reduce; in loops by their trip counts. Memory is that of the CPU program. float16 stands in for bfloat16, which XLA's CPU
compiler would widen to float32."""


def predict(machine: Machine, row: Figures) -> tuple[float, float]:
    """Seconds of a step in matmuls, and in collectives."""

    def speed(c: Collective) -> float:
        near = all(max(group) // machine.island == min(group) // machine.island for group in c.groups)
        return machine.near if near else machine.far

    return row.done / (UTILISATION * machine.peak), sum(c.sent / speed(c) for c in row.reading.collectives)


def tables(rows: Sequence[Figures]) -> Iterable[Table]:
    """What was read, and what is predicted."""
    sent = [kind for kind in KINDS if any(row.reading.sent((kind,)) for row in rows)]
    kinds = [kind.removeprefix("collective-") for kind in sent]
    read_table = Table("devices", "data × fsdp × expert", "formula", "program", *kinds, "state", "temporaries")
    for row in rows:
        mesh = f"{row.mesh.data} × {row.mesh.fsdp} × {row.mesh.expert}"
        by_kind = [f"{row.reading.sent((kind,)) / 1e6:,.1f}" for kind in sent]
        memory = (f"{row.state / 1e9:.2f}", f"{row.temporaries / 1e9:.1f}")
        read_table.add_row(str(row.devices), mesh, f"{row.formula / 1e12:.1f}", f"{row.done / 1e12:.1f}", *by_kind, *memory)
    yield read_table
    predicted = Table("machine", "devices", "matmuls, ms", "collectives, ms", "step, ms", "efficiency, %")
    for machine in MACHINES:
        alone = sum(predict(machine, rows[0])) if rows[0].devices == 1 else math.nan
        for row in rows:
            compute, talk = predict(machine, row)
            slow, fast = compute + talk, max(compute, talk)
            shown = (f"{compute * 1e3:.0f}", f"{talk * 1e3:.1f}", f"{slow * 1e3:.0f} – {fast * 1e3:.0f}")
            share = "–" if math.isnan(alone) else f"{100 * alone / slow:.0f} – {100 * alone / fast:.0f}"
            predicted.add_row(machine.name, str(row.devices), *shown, share)
    yield predicted


def as_json(row: Figures) -> dict[str, Any]:
    """The row as plain values."""
    sent = {kind: row.reading.sent((kind,)) for kind in KINDS}
    times = {machine.name: dict(zip(("matmuls", "collectives"), predict(machine, row), strict=True)) for machine in MACHINES}
    rest = {k: v for k, v in dataclasses.asdict(row).items() if k != "reading"}
    return {"devices": row.devices, **rest, "bytes_sent": sent, "payload": row.reading.payload(), "seconds": times}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the step for every number of devices, prints both tables; exit status 1 if a promise is broken."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--devices", nargs="+", type=int, default=list(DEVICES), metavar="N", help="numbers of devices: 1, 2, multiples of 4"
    )
    parser.add_argument("--dispatch", choices=get_args(Dispatch), default="replicate", help="as --mesh.dispatch of a run")
    parser.add_argument("--json", type=json_file, help="also write the rows to this file")
    args = parser.parse_args(arguments)
    try:
        meshes = [split(n, args.dispatch) for n in sorted(set(args.devices))]
    except ValueError as error:
        parser.error(str(error))
    # Nothing runs, so machine code need not be good; the program that is read is made before it.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    jax.config.update("jax_platforms", "cpu")
    if jax.config.values["jax_num_cpu_devices"] < max(args.devices):  # possible before the first array only
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    config = PRESETS["arc1"][1]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float16"))
    console = Console(width=max(Console().width, 132))
    rows = []
    try:
        for mesh in meshes:
            rows.append(measure(config, mesh))
            console.print(f"{rows[-1].devices} devices: compiled", highlight=False)
        broken = flat(rows)
    except ValueError as error:
        broken = str(error)
    for table, note in zip(tables(rows) if rows else (), (READ, ASSUMPTIONS), strict=False):
        console.print(table)
        console.print(note, highlight=False, markup=False)
    if args.json:
        write_atomically(args.json, json.dumps([as_json(row) for row in rows], indent=2) + "\n")
    if broken:
        sys.exit(f"error: {broken}")
