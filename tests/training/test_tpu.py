"""The train step compiles for TPUs, ahead of time: needs `pip install libtpu`, and no TPU."""

import dataclasses

import jax
import pytest
import scaling
from jax.experimental import topologies

from tinyonn_jax.config import MeshConfig
from tinyonn_jax.presets import PRESETS
from tinyonn_jax.training import assemble, sharding

pytest.importorskip("libtpu")


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # what it holds loads on a TPU only
@pytest.mark.parametrize("dispatch", ["replicate", "all-to-all"])
def test_step_compiles_where_gradients_are_summed_over_fsdp_in_the_scan(monkeypatch, dispatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    chips = topologies.get_topology_desc("v5p:2x2x1", platform="tpu").devices
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
