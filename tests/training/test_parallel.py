"""A whole step on eight simulated devices: gradients, signals and losses of one, what is sent, and restoring elsewhere."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.layers.naive import make
from tests.models import tiny
from tinyonn_jax.config import Config, ConfigError, LearningConfig, MeshConfig, OptimConfig, TrainConfig
from tinyonn_jax.layers.layout import over
from tinyonn_jax.models import transformer
from tinyonn_jax.training import assemble, sharding
from tinyonn_jax.training.checkpoint import Checkpoints
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.step import gradients

ROWS, LENGTH = 16, 9
MODEL = tiny.config(dim=16, latent_heads=16, experts=8, expert_hidden=10)
CONFIG = Config(
    model=MODEL, learning=LearningConfig(granularity="module"), optim=OptimConfig(matrices="adamw"), train=TrainConfig(steps=6)
)
ALL = MeshConfig(data=2, fsdp=2, expert=2)


@cache
def step(mesh_cfg: MeshConfig):
    """Gradients, routings, signals and metrics of one step, and the text of the compiled program."""
    mesh, rule = sharding.make_mesh(mesh_cfg), make_rule(CONFIG)
    spec = transformer.spec(MODEL, tiny.TASKS)
    params = jax.device_put(make(spec), sharding.shardings(mesh, spec))
    loss_fn = over(sharding.layout(mesh))(make_loss(CONFIG, rule))
    batch = sharding.shard_batch(mesh, tiny.batch(ROWS, LENGTH))
    compiled = jax.jit(lambda p, b: gradients(loss_fn, rule, p, None, b)).lower(params, batch).compile()
    return compiled(params, batch), compiled.as_text()


@pytest.mark.parametrize("mesh", [ALL, MeshConfig(1, 1, 8), MeshConfig(2, 1, 4)], ids=str)
def test_every_gradient_and_signal_is_that_of_one_device(mesh):
    (want, _), (got, _) = step(MeshConfig(1)), step(mesh)
    for (path, expected), found in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
        scale = max(np.max(np.abs(expected), where=np.isfinite(expected), initial=0), 1e-6)
        np.testing.assert_allclose(found, expected, 0, 1e-5 * scale, err_msg=jax.tree_util.keystr(path))


GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather")


def test_neither_tokens_nor_all_modules_are_gathered():
    """Only a device's own modules are put together (over fsdp), and the logits of its own tokens (over expert)."""
    tokens, devices = ROWS * LENGTH, 4
    gathered = {tuple(int(n) for n in shape.split(",") if n) for _, shape in GATHER.findall(step(ALL)[1])}
    own = (MODEL.experts // 2, MODEL.dim, 2 * MODEL.expert_hidden)
    assert own in gathered  # the pattern finds what is there
    assert not [shape for shape in gathered if tokens in shape or (ROWS in shape[:1] and LENGTH in shape)]
    assert not [s for s in gathered if len(s) == 3 and s[0] in (MODEL.experts, MODEL.latent_heads) and s[0] != tokens // devices]


def test_the_pattern_would_find_them():
    """Partitioned automatically, the same step gathers both."""


@pytest.mark.parametrize(("changes", "words"), [
    ({"experts": 9}, ("mesh.expert (2)", "model.experts (9)")),
    ({"latent_heads": 6, "heads": 6, "active_heads": 1, "experts": 8}, ()),
    ({"kind": "dense"}, ("mesh.expert", "model.kind")),
])  # fmt: skip
def test_module_counts_must_divide(changes, words):
    def build():
        return replace(CONFIG, model=replace(MODEL, **changes), mesh=MeshConfig(expert=2))

    if not words:
        build()
        return
    with pytest.raises(ConfigError) as error:
        build()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def train(folder: Path, mesh_cfg: MeshConfig, steps: int) -> list[float]:
    """The losses of the steps that follow the newest checkpoint, which is then replaced."""
    mesh = sharding.make_mesh(mesh_cfg)
    batches = [jax.tree.map(np.asarray, tiny.batch(ROWS, LENGTH, seed)) for seed in range(6)]
    program = assemble.assemble(CONFIG, mesh, tiny.TASKS, batches[0])
    losses = []
    with Checkpoints(folder, 9, {}, print) as checkpoints:
        state = checkpoints.restore(program.like)
        state = program.initial() if state is None else state
        for n in range(int(state.step), steps):
            state, metrics = program.step(state, program.put(batches[n]))
            losses.append(float(metrics["main_loss"]))
        if folder.name == "written":
            checkpoints.save(steps, state, None)
            checkpoints.wait()
    return losses


ELSEWHERE = """
import sys, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from pathlib import Path
from tests.training.test_parallel import train
from tinyonn_jax.config import MeshConfig
print("losses", *train(Path(sys.argv[2]), MeshConfig(*map(int, sys.argv[3:])), 6))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint of eight devices after three steps, and the losses of the three that follow there."""
    folder = tmp_path_factory.mktemp("elastic") / "written"
    train(folder, ALL, 3)
    again = folder.rename(folder.with_name("read"))
    return again, train(again, ALL, 6)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 2), (1, 4, 1), (2, 2, 4)], ids=str)
def test_a_checkpoint_goes_on_elsewhere(written, mesh):
    folder, want = written
    devices = int(np.prod(mesh))
    if devices <= 8:
        losses = train(folder, MeshConfig(*mesh), 6)
    else:
        command = [sys.executable, "-c", ELSEWHERE, str(devices), str(folder), *map(str, mesh)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        losses = [float(x) for x in done.stdout.split("losses")[1].split()]
    assert len(losses) == 3
    np.testing.assert_allclose(losses, want, rtol=0, atol=1e-5)
