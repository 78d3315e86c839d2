"""A run small enough to be killed many times: linear regression through the real loop, checkpoints and writer.

python -m tests.training.toy FOLDER [name=value …]
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tinyonn_jax.config import TrainConfig
from tinyonn_jax.observe.console import Progress
from tinyonn_jax.observe.writers import MetricsWriter
from tinyonn_jax.training.checkpoint import CheckpointError, Checkpoints
from tinyonn_jax.training.loop import DivergedError, InterruptedRun, run

WIDTH = 64


@flax.struct.dataclass
class State:
    """Enough of a training state for the loop: momentum stands for the optimizers."""

    step: Any
    params: Any
    ema: Any
    momentum: Any
    skipped: Any


def initial() -> State:
    params = {"w": jax.random.normal(jax.random.key(0), (WIDTH, WIDTH))}
    return State(jnp.int32(0), params, jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params), jnp.int32(0))


def batch_at(step: int, poison: int = 0) -> np.ndarray:
    x = np.random.default_rng(step).normal(size=(8, WIDTH)).astype(np.float32)
    return x * np.nan if poison and step + 1 >= poison else x


@partial(jax.jit, donate_argnums=0)
def step(state: State, x: jax.Array) -> tuple[State, dict[str, Any]]:
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] - x) ** 2))(state.params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
    params = jax.tree.map(lambda p, m: p - 0.3 * m, state.params, momentum)
    new = State(state.step + 1, params, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, params), momentum, jnp.int32(0))
    kept = state.replace(step=state.step + 1, skipped=state.skipped + 1)
    state = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, kept)
    return state, {"main_loss": loss, "skipped": state.skipped, "layers": {"w": {"load": jnp.abs(state.params["w"]).mean(0)[:4]}}}


def validate(state: State) -> dict[str, float]:
    return {"valid_exact": float(-jnp.abs(state.ema["w"] - jnp.eye(WIDTH)).mean())}


def train(folder: Path, cfg: TrainConfig, pause: float = 0.0, poison: int = 0, max_skipped: int = 3, say=print) -> State:
    def slowly(state, x):
        time.sleep(pause)
        return step(state, x)

    with Checkpoints(folder / "checkpoints", cfg.keep, {"toy": {"size": 1}}, say) as checkpoints:
        state = checkpoints.restore(initial())
        if state is None:
            state = initial()
        with MetricsWriter(folder, int(state.step)) as writer, Progress(cfg.steps, int(state.step)) as progress:
            return run(
                slowly,
                state,
                partial(batch_at, poison=poison),
                cfg,
                checkpoints,
                writer,
                progress,
                max_skipped=max_skipped,
                tokens=len,
                validate=validate,
            )


def main(folder: str, *settings: str) -> int:
    values = {name: float(value) for name, value in (s.split("=") for s in settings)}
    pause, poison = values.pop("pause", 0.0), int(values.pop("poison", 0))
    try:
        train(Path(folder), TrainConfig(**{name: int(value) for name, value in values.items()}), pause, poison)
    except InterruptedRun as stop:
        print(stop)
        return 128 + stop.signum
    except (DivergedError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
