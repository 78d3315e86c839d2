"""Where arrays live: a mesh of devices, one table from logical axes to mesh axes, and shardings derived from it.

Mesh axes: `data` splits the batch; `fsdp` splits the batch and every parameter along its `embed` axis; `expert` splits the
modules of routed layers. Parameters are born sharded (eval_shape → shardings → jitted init), and optimizer state takes the
sharding of the parameter it belongs to.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tinyonn_jax.config import ConfigError, MeshConfig
from tinyonn_jax.layers.base import Param, is_param
from tinyonn_jax.layers.layout import Layout

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "expert")
EXCHANGE = "exchange"
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", EXCHANGE),
    "embed": ("fsdp",),
    "experts": ("expert", EXCHANGE),
    "modules": ("expert", EXCHANGE),
}
"""Logical axis → those of these mesh axes that the mesh has; an axis that is not named here is never split.

With `mesh.dispatch all-to-all` the mesh axis `exchange` takes the place of `expert`: the batch is split along it as well.
"""


def make_mesh(cfg: MeshConfig, local: bool = False) -> Mesh:
    """The mesh `data × fsdp × expert` over the devices of all processes, or of this one (`local`), with automatic partitioning.

    `data` 0 takes all that remain; a process by itself may use fewer devices than there are.

    Raises:
        ConfigError: the devices do not divide so, or do not run the kernel.
    """
    devices, inner = jax.local_devices() if local else jax.devices(), cfg.fsdp * cfg.expert
    data = cfg.data or len(devices) // inner
    if not cfg.data and (data == 0 or len(devices) % inner):
        raise ConfigError(
            f"mesh.fsdp × mesh.expert ({cfg.fsdp} × {cfg.expert}) must divide the number of devices, which is {len(devices)}; "
            "choose others, let mesh.data use fewer, or simulate devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
        )
    used = data * inner
    if used > len(devices) or (not local and jax.process_count() > 1 and used != len(devices)):
        need = "needs" if used > len(devices) else "leaves some of the processes without a device: it takes"
        raise ConfigError(
            f"mesh.data × mesh.fsdp × mesh.expert ({data} × {cfg.fsdp} × {cfg.expert}) {need} {used} devices, and there are "
            f"{len(devices)}; choose another --mesh.data (0 takes all that remain)"
        )
    if cfg.grouped == "tokamax" and not importlib.util.find_spec("tokamax"):
        raise ConfigError("mesh.grouped tokamax needs an optional package: pip install 'tinyonn_jax[tokamax]'")
    if cfg.grouped == "pallas" and devices[0].platform not in ("cpu", "gpu"):
        raise ConfigError(f"mesh.grouped pallas runs on GPUs, not on a {devices[0].platform}: leave it at auto")
    shape, names = (data, cfg.fsdp, cfg.expert), MESH_AXES
    if cfg.dispatch == "all-to-all" and cfg.expert > 1:
        names = (*MESH_AXES[:2], EXCHANGE)
    return Mesh(_arranged(shape, devices[:used]), names, axis_types=(AxisType.Auto,) * len(shape))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in this shape, neighbours along the last axes; slow links, between nodes of GPUs and slices of TPUs, along the
    first, as few as can be.

    Raises:
        ConfigError: they cannot be laid out so.
    """
    slices = rest = len({getattr(device, "slice_index", 0) for device in devices})
    between = []
    for size in shape:
        between.append(math.gcd(size, rest))
        rest //= between[-1]
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        within = [size // n for size, n in zip(shape, between, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    except (ValueError, AssertionError):  # slices that do not divide the shape or differ in size; chips that are no box
        sizes = " × ".join(map(str, shape))
        where = f"{slices} slices or nodes of" if slices > 1 else "the links of"
        raise ConfigError(f"mesh.data × mesh.fsdp × mesh.expert ({sizes}) cannot be laid over {where} these devices") from None


def _along(mesh: Mesh, name: str | None) -> tuple[str, ...]:
    """The axes of this mesh over which a logical axis is split."""
    return tuple(axis for axis in RULES.get(name or "", ()) if axis in mesh.shape)


def rows(mesh: Mesh) -> PartitionSpec:
    """How the rows of a batch are split."""
    return PartitionSpec(_along(mesh, "batch"))


def describe(mesh: Mesh) -> str:
    """The devices of a mesh in one line."""
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"devices: {mesh.size} × {mesh.devices.flat[0].device_kind} ({shape}), jax {jax.__version__}"


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in _along(mesh, "batch")]))


def feeding(mesh: Mesh) -> tuple[int, int]:
    """(p, P): this process feeds the p-th of P equal slices of a batch. Processes that share `expert` groups feed the same one.

    Raises:
        ConfigError: the slices of two processes overlap in part.
    """
    holders = [{device.process_index for device in group} for group in mesh.devices.reshape(row_shards(mesh), -1)]
    slices = {p: tuple(i for i, group in enumerate(holders) if p in group) for p in set().union(*holders)}
    different = sorted(set(slices.values()))
    if len(different) * len(different[0]) != len(holders):
        raise ConfigError("mesh.expert does not fit the processes: let it divide the devices of one process, or be a multiple")
    return different.index(slices[jax.process_index()]), len(different)


def layout(mesh: Mesh, capacity: float = math.inf) -> Layout | None:
    """How routed layers run over the mesh; None on one device. `capacity` as in `Layout`.

    Only TPUs send raggedly: XLA has no such operation for CPUs, and on GPUs its gradients came out wrong (jaxlib 0.11,
    marin-community/marin 8077), more than 32 of them failed (openxla/xla 47283), and those of one host were slow (33386).
    """
    ragged = mesh.devices.flat[0].platform == "tpu"
    return Layout(mesh, partial(partition, mesh), capacity, ragged) if mesh.size > 1 else None


def partition(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """How an array with these logical axes is split. A dimension that does not divide stays whole.

    Raises:
        ValueError: two of its axes are split over the same mesh axis.
    """
    split, taken = [], set()
    for name, size in zip(axes, shape, strict=True):
        over = _along(mesh, name)
        if taken & set(over):
            raise ValueError(f"logical axes {axes} split over the same mesh axis twice: {sorted(taken & set(over))}")
        taken |= set(over)
        split.append(over if size % int(np.prod([mesh.shape[a] for a in over])) == 0 and over else None)
    return PartitionSpec(*split)


def state_shardings(mesh: Mesh, spec: Any, state: T) -> T:
    """A `NamedSharding` for every leaf of a state (of arrays or `jax.ShapeDtypeStruct`s) over parameters of `spec`.

    A leaf belongs to the parameter whose path ends its own and whose shape it has (the parameters, their average, moments of an
    optimizer); all others are replicated.
    """
    known = {path: p for path, p in jax.tree_util.tree_leaves_with_path(spec, is_leaf=is_param) if isinstance(p, Param)}
    longest = max(map(len, known), default=0)

    def of(path, leaf) -> NamedSharding:
        for n in range(min(longest, len(path)), 0, -1):
            param = known.get(path[-n:])
            if param is not None and param.shape == leaf.shape:
                return NamedSharding(mesh, partition(mesh, param.axes, param.shape))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def abstract(mesh: Mesh, spec: Any, make: Callable[[], T]) -> T:
    """What `make` would return, as `jax.ShapeDtypeStruct`s with the shardings it should have."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, state_shardings(mesh, spec, shapes)
    )


def born_sharded(make: Callable[[], T], like: T) -> T:
    """What `make` returns, each array made where `like` says it belongs: no device ever holds the whole."""
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()


def shard_batch(mesh: Mesh, batch: T) -> T:
    """Host arrays of one batch, this process's rows, as global arrays split by rows over all devices of the mesh.

    Raises:
        ValueError: the rows do not divide by the devices.
    """
    sharding = NamedSharding(mesh, rows(mesh))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
