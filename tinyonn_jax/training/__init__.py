"""State, optimizers, the train step, sharding, checkpoints and the loop."""
