"""The presets (`--preset`): each a size, a data set and a budget. Every field can be overridden on the command line."""

from dataclasses import replace
from typing import Literal, get_args

from tinyonn_jax.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig

Preset = Literal["smoke", "demo", "continual", "laptop", "arc1", "arc2"]

_ARC1 = Config(
    model=ModelConfig(
        dim=768,
        heads=12,
        head_dim=64,
        latent_heads=24,
        hidden=3072,
        experts=16,
        expert_hidden=1536,
        depth=8,
        dtype="bfloat16",
    ),
    optim=OptimConfig(muon_lr=1.66e-3, lr=3e-4, meta_lr=3e-4, decay_from=0.8, ema=0.999),
    data=DataConfig(
        train=("arc1", "arc2"),
        eval="arc1",
        buckets=(64, 96, 128, 192, 256, 384, 512, 768, 1024, 1408, 1920),
        tokens_per_batch=16_384,
        drop_overlap=True,
    ),
    train=TrainConfig(steps=200_000, log_every=100, checkpoint_every=2000),
    eval=EvalConfig(augmentations=300, batch=512),
)

PRESETS: dict[str, tuple[str, Config]] = {
    "smoke": (
        "six tiny tasks, 200 steps, seconds: does everything run?",
        Config(
            model=ModelConfig(dim=32, heads=2, head_dim=16, latent_heads=4, hidden=48, experts=4, expert_hidden=24, depth=2),
            data=DataConfig(max_grid=4, smallest=6, buckets=(16, 32, 48), tokens_per_batch=256),
            train=TrainConfig(steps=200, log_every=10, checkpoint_every=20),
            eval=EvalConfig(augmentations=4),
        ),
    ),
    "demo": (
        "the 30 smallest ARC-AGI-1 training tasks; about five minutes on two CPU cores, dense half of that",
        Config(
            optim=OptimConfig(lr=1e-2),
            data=DataConfig(smallest=30, buckets=(24, 32, 48, 64), tokens_per_batch=1024),
            train=TrainConfig(steps=1300, validate_every=500),
        ),
    ),
    "continual": (
        "the tasks of demo, three at a time and never again: how much is forgotten? A minute or two a network on two CPU cores",
        Config(
            model=ModelConfig(dim=64, heads=4, head_dim=16, active_heads=2, hidden=192, expert_hidden=96, depth=2),
            optim=OptimConfig(decay_from=1.0, ema=0.0),
            data=DataConfig(smallest=30, sequence=10, buckets=(64,), tokens_per_batch=1024),
            train=TrainConfig(steps=500, checkpoint_every=100),
        ),
    ),
    "laptop": (
        "the 178 ARC-AGI-1 training tasks with grids up to 10 x 10; on one CPU core about 80 minutes, dense about 50",
        Config(
            model=ModelConfig(recursion_embedding=True, short_conv=3),
            optim=OptimConfig(lr=1e-2, decay_from=0.02),
            data=DataConfig(max_grid=10),
            train=TrainConfig(steps=10_000, log_every=50, validate_every=2000),
        ),
    ),
    "arc1": ("ARC-AGI-1, scored on its 400 evaluation tasks; one large GPU, bfloat16", _ARC1),
    "arc2": (
        "ARC-AGI-2, scored on its 120 evaluation tasks; one large GPU, bfloat16",
        replace(_ARC1, data=replace(_ARC1.data, eval="arc2")),
    ),
}
assert set(PRESETS) == set(get_args(Preset))
