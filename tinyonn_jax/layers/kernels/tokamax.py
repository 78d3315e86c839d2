"""The grouped matmul of the optional package tokamax, which picks its own kernel for the device; else as `ragged`."""

from functools import partial

from tokamax import ragged_dot, ragged_dot_general

from tinyonn_jax.layers.kernels import ragged

forward = partial(ragged.forward, dot=ragged_dot)
backward = partial(ragged.backward, dot=ragged_dot, dot_general=ragged_dot_general)
