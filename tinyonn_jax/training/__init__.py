"""State, optimizers, the train step, sharding, checkpoints and the loop."""

from tinyonn_jax.training.optim import labels
from tinyonn_jax.training.state import TrainState
from tinyonn_jax.training.step import Aux, init_state, make_train_step

__all__ = ["Aux", "TrainState", "init_state", "labels", "make_train_step"]
