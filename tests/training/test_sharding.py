"""Meshes, the table of axes, and states that are born sharded, on eight simulated devices."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tinyonn_jax.config import ConfigError, MeshConfig, OptimConfig
from tinyonn_jax.layers.base import Param, init, normal
from tinyonn_jax.training import sharding
from tinyonn_jax.training.optim import make_optimizer
from tinyonn_jax.training.state import TrainState

SPEC = {
    "w_in": Param((16, 24), ("embed", "hidden"), normal(1.0)),
    "odd": Param((6, 5), (None, "embed"), normal(1.0)),
    "router": {"proto": Param((4, 16), ("modules", "embed"), normal(1.0))},
}


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(fsdp=2, expert=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=2), (2, 2, 1)),
        (MeshConfig(data=1), (1, 1, 1)),
    ],
)
def test_mesh_takes_the_devices_asked_for(cfg, shape):
    mesh = sharding.make_mesh(cfg)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert"), shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        (MeshConfig(fsdp=3), "divide .* 8"),
        (MeshConfig(fsdp=16), "divide"),
        (MeshConfig(data=5, fsdp=2), "10 devices"),
        (MeshConfig(expert=5), "divide"),
    ],
)
def test_mesh_that_does_not_fit_is_one_clear_line(cfg, word):
    with pytest.raises(ConfigError, match=word) as error:
        sharding.make_mesh(cfg)
    assert "mesh.fsdp" in str(error.value) and "\n" not in str(error.value)


class Gpu:
    """What is looked at of a device."""

    platform, device_kind = "gpu", "H100"

    def __init__(self, id, node):
        self.id, self.slice_index = id, node


@pytest.mark.parametrize(
    ("shape", "per_node", "want"),
    [
        ((4, 2, 2), 8, [[0, 0], [0, 0], [1, 1], [1, 1]]),  # data alone goes over nodes
        ((2, 4, 2), 4, [[0, 0, 1, 1], [2, 2, 3, 3]]),  # fsdp too, where data cannot take them all
    ],
)
def test_as_few_axes_as_can_be_go_over_nodes(shape, per_node, want):
    devices = [Gpu(i, i // per_node) for i in (*range(8, 16), *range(8))]  # in the order in which processes happened to come
    nodes = np.array([gpu.slice_index for gpu in sharding._arranged(shape, devices).flat]).reshape(shape)
    np.testing.assert_array_equal(nodes, np.broadcast_to(np.array(want)[..., None], shape))


def test_nodes_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"2 × 4 × 1.*2 slices or nodes"):
        sharding._arranged((2, 4, 1), [Gpu(i, i // 5) for i in range(8)])


def test_embed_goes_over_fsdp_and_what_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(mesh, SPEC, SPEC))
    assert specs["w_in"] == P(("fsdp",), None) or specs["w_in"] == P("fsdp", None)
    assert specs["odd"] == P(None, None)  # 5 columns over 4 devices
    assert sharding.partition(mesh, ("batch", None), (8, 3)) == P(("data", "fsdp"), None)


def test_modules_go_over_expert():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert sharding.partition(mesh, ("experts", "embed", "hidden"), (4, 8, 6)) == P("expert", "fsdp", None)
    assert sharding.partition(mesh, ("modules", "embed"), (4, 8)) == P("expert", "fsdp")
    assert sharding.row_shards(mesh) == 4
    layout = sharding.layout(mesh)
    assert layout is not None and layout.tokens(8) == P(("data", "fsdp")) and layout.tokens(6) is None
    assert sharding.layout(sharding.make_mesh(MeshConfig(data=1))) is None


@pytest.mark.parametrize(("platform", "ragged"), [("cpu", False), ("gpu", False), ("tpu", True)])
def test_only_tpus_send_raggedly(platform, ragged):
    mesh = mock.Mock(size=8, devices=np.array([mock.Mock(platform=platform)]))
    layout = sharding.layout(mesh)
    assert layout is not None and layout.ragged == ragged


def test_tokens_that_are_sent_are_split_over_the_modules_axis_too():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2, dispatch="all-to-all"))
    assert sharding.partition(mesh, ("experts", "embed", "hidden"), (4, 8, 6)) == P("exchange", "fsdp", None)
    assert sharding.rows(mesh) == P(("data", "fsdp", "exchange")) and sharding.row_shards(mesh) == 8
    alone = sharding.make_mesh(MeshConfig(data=2, fsdp=2, dispatch="all-to-all"))
    assert sharding.rows(alone) == P(("data", "fsdp")) and sharding.row_shards(alone) == 4


def test_a_mesh_axis_used_twice_is_refused():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    with pytest.raises(ValueError, match=r"fsdp"):
        sharding.partition(mesh, ("embed", "embed"), (8, 8))
    with pytest.raises(ValueError, match=r"fsdp"):
        sharding.partition(mesh, ("batch", "embed"), (8, 8))


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_state_is_born_sharded_with_its_moments(matrices):
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    tx = make_optimizer(OptimConfig(matrices=matrices), 10)

    def make():
        return TrainState.create(init(jax.random.key(0), SPEC), tx, {"records": jnp.zeros(4)})

    state = sharding.born_sharded(make, sharding.abstract(mesh, SPEC, make))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, jax.jit(make)()))
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert {leaf.shape for leaf in split} == {(16, 24), (4, 16)}
    # Parameters, average and moments: one moment under Muon, two under AdamW; the prototypes always have two.
    assert sum(leaf.shape == (16, 24) for leaf in split) == (3 if matrices == "muon" else 4)
    assert sum(leaf.shape == (4, 16) for leaf in split) == 4
    assert state.params["w_in"].addressable_shards[0].data.shape == (2, 24)
    assert state.ema["router"]["proto"].addressable_shards[0].data.shape == (4, 2)


def test_a_leaf_with_the_path_of_a_parameter_but_another_shape_is_replicated():
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    specs = sharding.state_shardings(mesh, SPEC, {"stats": {"w_in": jnp.zeros(16)}, "w_in": jnp.zeros((16, 24))})
    assert specs["stats"]["w_in"].is_fully_replicated and not specs["w_in"].is_fully_replicated


def test_a_batch_is_split_by_rows():
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    rows = np.arange(48).reshape(16, 3)
    batch = sharding.shard_batch(mesh, {"x": rows, "y": rows[:, 0]})
    np.testing.assert_array_equal(batch["x"], rows)
    assert [s.data.shape for s in batch["x"].addressable_shards] == [(2, 3)] * 8
    with pytest.raises(ValueError, match="divide"):
        sharding.shard_batch(mesh, {"x": rows[:12]})


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from tinyonn_jax.config import MeshConfig
from tinyonn_jax.training.sharding import make_mesh, shard_batch
mesh = make_mesh(MeshConfig(fsdp=2))
assert mesh.devices.shape == (2, 2, 1), mesh
rows = np.arange(24, dtype=np.float32).reshape(8, 3)
half = np.split(rows, 2)[jax.process_index()]
x = shard_batch(mesh, half)
assert x.shape == (8, 3)
weighted = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())(x)
assert float(weighted) == float((rows * np.arange(8)[:, None]).sum()), weighted
print("agreed", flush=True)
"""


def test_two_processes_feed_one_batch(tmp_path: Path, unused_port: int):
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    command = [sys.executable, "-c", TWO_PROCESSES]
    programs = [
        subprocess.Popen([*command, str(i), str(unused_port)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    for program in programs:
        out, err = program.communicate(timeout=60)
        assert program.returncode == 0, err
        assert "agreed" in out
