"""For TPUs: the backend's own grouped matmul."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from tinyonn_jax.layers.kernels import module_norms, row_norms

_CONTRACT_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def _owned(x, sizes):
    """x, zero past the last module's rows."""
    return jnp.where((jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None], x, 0)


def forward(x, w, sizes, dot=lax.ragged_dot):
    return _owned(sequential_vmap(dot)(x, w, sizes), sizes)  # JAX batches it over one axis only


def backward(tapped, x, w, sizes, g, dot=lax.ragged_dot, dot_general=lax.ragged_dot_general):
    g = _owned(g, sizes)
    dx = forward(g, w.swapaxes(1, 2), sizes, dot)
    dot_general = partial(dot_general, ragged_dot_dimension_numbers=_CONTRACT_ROWS, preferred_element_type=jnp.float32)
    dw = sequential_vmap(dot_general)(x, g, sizes)
    return dx, dw.astype(w.dtype), row_norms(tapped, x, g, sizes), module_norms(tapped, dw)
