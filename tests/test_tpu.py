"""What runs on TPUs compiles for them, ahead of time: needs `pip install libtpu`, and no TPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import scaling
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tinyonn_jax.config import MeshConfig
from tinyonn_jax.layers.kernels import ragged
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, sharding

pytest.importorskip("libtpu")
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # what it holds loads on a TPU only


@pytest.fixture
def chips(monkeypatch):
    """Four TPU v5p, described."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    return topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices


@pytest.mark.parametrize("dispatch", ["replicate", "all-to-all"])
def test_step_compiles_where_gradients_are_summed_over_fsdp_in_the_scan(monkeypatch, chips, dispatch):
    monkeypatch.setattr(jax, "devices", lambda *_: chips)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arc1 = PRESETS["arc1"][1]
    small = dataclasses.replace(arc1.model, depth=2, dim=256, heads=4, latent_heads=8, hidden=512, expert_hidden=512)
    config = dataclasses.replace(arc1, model=small, mesh=MeshConfig(1, 2, 2, dispatch=dispatch))
    mesh = sharding.make_mesh(config.mesh)

    batch = scaling.abstract_batch(mesh, 32, 256)
    program = assemble.assemble(config, mesh, 1000, batch)
    text = program.step.lower(program.like, batch).compile().as_text()  # pyright: ignore[reportFunctionMemberAccess]
    assert "all-reduce" in text
    assert ("ragged-all-to-all" in text) == (dispatch == "all-to-all")


@pytest.mark.parametrize(
    ("topology", "slices", "mesh"),
    [("v5p:4x4x4", 1, (16, 2, 2)), ("v5p:4x4x4", 1, (1, 16, 4)), ("v6e:8x8", 1, (16, 2, 2)), ("v5p:2x2x1", 2, (2, 2, 2))],
)
def test_meshes_are_laid_over_pods(monkeypatch, chips, topology, slices, mesh):
    pod = topologies.get_topology_desc(topology, platform="tpu", num_slices=slices).devices
    monkeypatch.setattr(jax, "devices", lambda *_: pod)
    laid = sharding.make_mesh(MeshConfig(*mesh)).devices
    assert laid.shape == mesh and len(set(laid.flat)) == len(pod)
    if slices > 1:  # data lies over them
        assert all(len({chip.slice_index for chip in part.flat}) == 1 for part in laid)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("rows", "modules", "inputs", "outputs"),
    [(1, 4, 32, 48), (301, 5, 100, 30), (32_768, 16, 768, 3072), (65_536, 16, 1536, 768), (4096, 8, 4096, 3584)],
)
def test_grouped_matmul_is_one_kernel_that_fits_into_the_memory_of_a_core(chips, dtype, rows, modules, inputs, outputs):
    shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(chips[0]))
    x, w, sizes = shape((rows, inputs), dtype), shape((modules, inputs, outputs), dtype), shape((modules,), jnp.int32)
    y = jax.jit(ragged.forward).lower(x, w, sizes).compile()
    gradients = jax.jit(partial(ragged.backward, True)).lower(x, w, sizes, shape((rows, outputs), dtype)).compile()
    assert y.as_text().count('"tpu_custom_call"') > 0 < gradients.as_text().count('"tpu_custom_call"')
