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
from tinyonn_jax.learning import LearningRule
from tinyonn_jax.models import transformer
from tinyonn_jax.models.transformer import FEEDFORWARD
from tinyonn_jax.training import assemble, sharding
from tinyonn_jax.training.checkpoint import Checkpoints
from tinyonn_jax.training.objective import make_loss, make_rule
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import gradients

ROWS, LENGTH = 16, 9
MODEL = tiny.config(dim=16, latent_heads=16, experts=24, expert_hidden=10, recursion_embedding=True, short_conv=1)
CONFIG = Config(
    model=MODEL, learning=LearningConfig(granularity="module"), optim=OptimConfig(matrices="adamw"), train=TrainConfig(steps=6)
)
ALL = MeshConfig(data=2, fsdp=2, expert=2)
SENDING = MeshConfig(data=2, fsdp=2, expert=2, dispatch="all-to-all")  # room for twice an even share: all there is between two


def rule() -> LearningRule:
    """SARS, with the losses of both granularities added up."""
    module, token = (make_rule(replace(CONFIG, learning=LearningConfig(granularity=g))) for g in ("module", "token"))

    def objective(*args):
        (loss, found), (other, _) = module.objective(*args), token.objective(*args)
        return loss + other, found

    return module._replace(objective=objective)


@cache
def step(cfg: MeshConfig):
    """Gradients, routings, signals and metrics of one step, and the text of the compiled program."""
    mesh, learning = sharding.make_mesh(cfg), rule()
    spec = transformer.spec(MODEL, tiny.TASKS)
    params = jax.device_put(jax.device_get(make(spec)), sharding.state_shardings(mesh, spec, spec))
    loss_fn = over(sharding.layout(mesh, cfg.capacity))(make_loss(CONFIG, learning))
    batch = sharding.shard_batch(mesh, jax.device_get(tiny.batch(ROWS, LENGTH)))
    meta = learning.init(params, jax.eval_shape(loss_fn, params, None, batch)[1].routings)
    compiled = jax.jit(lambda p, b: gradients(loss_fn, learning, p, meta, b)).lower(params, batch).compile()
    return compiled(params, batch), compiled.as_text()


@pytest.mark.parametrize("mesh", [ALL, SENDING, MeshConfig(1, 1, 8), MeshConfig(4, 2, 1)], ids=str)
def test_every_gradient_and_signal_is_that_of_one_device(mesh):
    (want, _), (got, _) = step(MeshConfig(1)), step(mesh)
    grads, routings, *rest = got
    dropped = routings[FEEDFORWARD].dropped
    assert np.shape(dropped) == ((MODEL.depth, ROWS * LENGTH, 2) if mesh == SENDING else ()) and not np.any(dropped)
    got = grads, {**routings, FEEDFORWARD: routings[FEEDFORWARD].replace(dropped=None)}, *rest
    shares = [where.pop("dropped", None) for where in (rest[1], rest[1]["layers"][FEEDFORWARD])]
    assert shares == ([0, 0] if mesh == SENDING else [None, None])  # it is known where it can be
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


def test_gradients_of_routed_weights_are_scattered_over_fsdp():
    """In every recursion two matrices of the heads, two of the experts; all else is small, or whole on every device."""
    assert len(re.findall(r" reduce-scatter(?:-start)?\(", step(ALL)[1])) == 4 * MODEL.depth


def test_what_finds_no_room_is_counted_in_a_steps_metrics():
    (_, routings, signals, metrics), _ = step(replace(SENDING, capacity=0.25))
    dropped, active = routings[FEEDFORWARD].dropped, routings[FEEDFORWARD].active
    assert 0.5 < metrics["dropped"] < 1
    np.testing.assert_allclose(metrics["dropped"], dropped.sum() / active.sum(), rtol=1e-6)
    assert not np.any(np.where(dropped, signals[FEEDFORWARD].param, 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": 9}, ("mesh.expert (2)", "model.experts (9)")),
        ({"latent_heads": 6, "heads": 6, "experts": 9}, ("model.latent_heads (6)", "model.experts (9)")),
        ({"kind": "dense"}, ("mesh.expert (2)", "model.kind dyntrm")),
    ],
)
def test_modules_that_do_not_divide_are_one_clear_line(changes, words):
    with pytest.raises(ConfigError) as error:
        replace(CONFIG, model=replace(MODEL, **changes), mesh=MeshConfig(expert=2))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


STEPS = 6
BATCHES = [jax.tree.map(np.asarray, tiny.batch(ROWS, LENGTH, seed)) for seed in range(STEPS)]


def assembled(cfg: MeshConfig) -> assemble.Program:
    return assemble.assemble(CONFIG, sharding.make_mesh(cfg), tiny.TASKS, BATCHES[0])


def go_on(program: assemble.Program, state, until: int) -> tuple[TrainState, list[float]]:
    losses = []
    for batch in BATCHES[int(state.step) : until]:
        state, metrics = program.step(state, program.put(batch))
        losses.append(float(metrics["main_loss"]))
    return state, losses


def restored(program: assemble.Program, folder: Path) -> TrainState:
    with Checkpoints(folder, 2, {}, print) as checkpoints:
        state = checkpoints.restore(program.like)
    assert state is not None and int(state.step) == STEPS // 2
    return state


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState, list[float]]:
    """A checkpoint that eight devices wrote halfway, what was in it, and the losses of the steps that followed there."""
    folder, program = tmp_path_factory.mktemp("elastic"), assembled(ALL)
    state, _ = go_on(program, program.initial(), STEPS // 2)
    with Checkpoints(folder, 2, {}, print) as checkpoints:
        checkpoints.save(STEPS // 2, state, None)
        checkpoints.wait()
    return folder, jax.device_get(state), go_on(program, state, STEPS)[1]


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 2), (1, 4, 1), (2, 1, 2), (1, 1, 8)], ids=str)
def test_a_checkpoint_restores_on_any_mesh(written, mesh):
    got = restored(assembled(MeshConfig(*mesh)), written[0])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), written[1])
    split = got.params.block.feedforward.modules.w_in.sharding.shard_shape((24, 16, 20))
    assert split == (24 // mesh[2], 16 // mesh[1], 20)


def goes_on(folder: Path, mesh: MeshConfig) -> list[float]:
    program = assembled(mesh)
    return go_on(program, restored(program, folder), STEPS)[1]


SIXTEEN = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 16)
from pathlib import Path
from tests.training import test_parallel as t
print("losses", *t.goes_on(Path(sys.argv[1]), t.MeshConfig(2, 2, 4)))
"""


def test_a_run_goes_on_with_the_same_losses_on_fewer_devices_and_on_more(written):
    folder, _, want = written
    command = [sys.executable, "-c", SIXTEEN, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fewer = [goes_on(folder, MeshConfig(*shape)) for shape in ((1, 1, 1), (1, 2, 1), (2, 1, 2))]
    for losses in (*fewer, [float(x) for x in done.stdout.split("losses")[1].split()]):
        assert len(losses) == STEPS // 2
        np.testing.assert_allclose(losses, want, rtol=0, atol=1e-5)
