"""Parameters declared once, configurations checked, and the small maths that layers share: products with weights, norms, entropy,
rotary positions.

A layer's `spec(cfg)` returns its params struct filled with `Param(shape, axes, init)`; `init` and the sharding tree both
derive from it by tree map. Letters: N tokens, D model, C head size, T positions.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Initializer = Callable[[Array, tuple[int, ...]], Array]


@dataclass(frozen=True)
class Param:
    """One parameter before it exists.

    `axes` names each dimension logically ("embed", "hidden", "experts", …; None for one that is never split);
    `init(key, shape)` makes the float32 array.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def tokens_of(x: Float[Array, "*B D"], dim: int, axes: int) -> Float[Array, "N D"]:
    """The tokens of x, one after the other.

    Raises:
        ValueError: x has another number of axes, is not `dim` wide, is not of floating point, or has no tokens.
    """
    x = jnp.asarray(x)
    if x.ndim != axes or x.shape[-1] != dim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected {axes} axes, the last of them {dim} wide, of floating point; got {x.dtype}{list(x.shape)}")
    if not x.size:
        raise ValueError(f"there are no tokens in x, {x.dtype}{list(x.shape)}")
    return x.reshape(-1, dim)


def valid_of(valid: Bool[Array, "*B"] | None, x: Float[Array, "*B D"]) -> Bool[Array, " N"] | None:
    """Which of the tokens of x are valid, one after the other; None where all are.

    Raises:
        ValueError: `valid` is not as x is without its last axis.
    """
    if valid is None:
        return None
    if valid.shape != x.shape[:-1]:
        raise ValueError(f"`valid` must tell of each token of x {list(x.shape)}; got {list(valid.shape)}")
    return valid.reshape(-1)


def wrong_choices(config: Any) -> Iterator[str]:
    """For each field of a dataclass that holds none of its named choices (`Literal`), a line that says so."""
    for name, hint in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(hint)
        if get_origin(hint) is Literal and value not in choices:
            yield f"{name} must be one of {', '.join(choices)}; got {value!r}"


def is_param(x: Any) -> bool:
    """Whether x is a `Param`: the leaf test for tree maps over specs."""
    return isinstance(x, Param)


def normal(scale: float) -> Initializer:
    """Normal with standard deviation `scale`."""
    return lambda key, shape: scale * jax.random.normal(key, shape, jnp.float32)


def fan_in(key: Array, shape: tuple[int, ...]) -> Array:
    """Normal with variance 1 / size of the last axis but one, which is contracted."""
    return jax.random.normal(key, shape, jnp.float32) * shape[-2] ** -0.5


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    """All zero."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: Array, shape: tuple[int, ...]) -> Array:
    """All one."""
    return jnp.ones(shape, jnp.float32)


def init(key: Array, spec: Any) -> Any:
    """Arrays for every `Param` of `spec`. A leaf's key follows from its path: a new layer leaves the others as they were."""

    def make(path, p):
        leaf_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF)
        return p.init(leaf_key, p.shape)

    return jax.tree_util.tree_map_with_path(make, spec, is_leaf=is_param)


def stack(spec: Any, layers: int) -> Any:
    """The spec of `layers` copies with parameters of their own, stacked along a new leading axis."""

    def lead(p: Param) -> Param:
        return Param(
            (layers, *p.shape),
            ("layers", *p.axes),
            lambda key, shape: jax.vmap(lambda k: p.init(k, shape[1:]))(jax.random.split(key, shape[0])),
        )

    return jax.tree.map(lead, spec, is_leaf=is_param)


def contract_rows(x: Float[Array, "N I"], g: Float[Array, "N O"]) -> Float[Array, "I O"]:
    """xᵀ·g, summed in float32 at least: the gradient of a weight that rows x met, and to which g came back.

    A CPU takes up to twice as long where the first factor is the wider one, so it makes gᵀ·x and turns that over; the barrier
    keeps XLA from turning it back.
    """
    matmul = partial(jnp.matmul, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    if x.shape[1] <= g.shape[1] or jax.default_backend() != "cpu":
        return matmul(x.T, g)
    return jax.lax.optimization_barrier(matmul(g.T, x)).T


@jax.custom_vjp
def linear(x: Float[Array, "N I"], w: Float[Array, "I O"]) -> Float[Array, "N O"]:
    """x·w, its weight gradient by `contract_rows`."""
    return x @ w


linear.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, contract_rows(saved[0], g).astype(saved[1].dtype)),
)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """x / rms(x) · scale over the last axis, in float32 whatever the type of x (Zhang and Sennrich, 2019)."""
    x32 = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # one axis of rows: see `entropy`
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-6) * scale).astype(x.dtype).reshape(x.shape)


def _standard(x: Float[Array, "*B D"]) -> tuple[Array, Array]:
    """(x - mean) / std over the last axis, and 1 / std, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + 1e-6)
    return centred * scale, scale


# Rules of gradients call plain functions, never one with a rule of its own, which `jax.jvp` of a gradient could not enter.


def _layer_norm(x, scale, bias):
    return (_standard(x)[0] * scale + bias).astype(x.dtype)


@jax.custom_vjp
def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"]) -> Array:
    """(x - mean) / std · scale + bias over the last axis, in float32 (Ba et al., 2016)."""
    return _layer_norm(x, scale, bias)


def _layer_norm_bwd(saved, g):
    x, scale, bias = saved
    (z, by_std), g = _standard(x), g.astype(jnp.float32)
    along = g * z
    # Means of products with `scale` as matmuls, or a CPU writes the products out; exact, as sums are.
    mean = lambda v: jnp.matmul(v, scale, precision=jax.lax.Precision.HIGHEST)[..., None] / v.shape[-1]  # noqa: E731
    rows = lambda v: jnp.sum(v.reshape(-1, v.shape[-1]), 0)  # noqa: E731
    dx = by_std * (g * scale - mean(g) - z * mean(along))
    return dx.astype(x.dtype), rows(along).astype(scale.dtype), rows(g).astype(bias.dtype)


# Only what goes in is kept for the backward pass: so the forward pass is one and the same program wherever it is made, and
# prototypes that are refined for the model and for a routers' loss are refined once.
layer_norm.defvjp(lambda x, scale, bias: (_layer_norm(x, scale, bias), (x, scale, bias)), _layer_norm_bwd)


@jax.custom_vjp
def entropy(logits: Float[Array, "*R P"]) -> Float[Array, "*R"]:
    """Entropy H = −Σ p log p of p = softmax(logits) over the last axis, in nats. Its gradient −p (log p + H) in closed form."""
    return _entropy_fwd(logits)[0]


def _entropy_fwd(logits):
    lead = logits.shape[:-1]
    # Without axes of length one: reducing a product of arrays that have some takes jaxlib 0.10 thirty times as long on CPUs.
    rows = logits.reshape(*(n for n in lead if n != 1), logits.shape[-1])
    peak = jnp.max(rows, -1)
    z = jnp.maximum(rows - peak[..., None], jnp.finfo(rows.dtype).min)  # finite also of logits −∞, whose p is 0
    e = jnp.exp(z)
    total = jnp.sum(e, -1)
    h = jnp.log(total) - jnp.sum(e * z, -1) / total
    return h.reshape(lead), (logits, (peak + jnp.log(total)).reshape(*lead, 1), h.reshape(*lead, 1))


def _entropy_bwd(saved, g):
    logits, log_total, h = saved
    log_p = jnp.maximum(logits - log_total, jnp.finfo(logits.dtype).min)
    return (-g[..., None] * jnp.exp(log_p) * (log_p + h),)


entropy.defvjp(_entropy_fwd, _entropy_bwd)


def rotation(positions: Int[Array, "B T A"], size: int, base: float = 100.0) -> tuple[Array, Array]:
    """Cosines and sines `[B,T,1,C/2]` that rotate heads of `size` C by A-dimensional positions (Su et al., 2021).

    A = 1 for text, 3 for grids as (x, y, grid index). The C/2 frequency pairs are dealt out to the axes in turn, so every axis
    gets n = ⌈C/2 / A⌉ or one less, with wavelengths 2π·base^(i/n), i = 0 … n-1.

    Raises:
        ValueError: heads of an odd size, or with fewer pairs than there are axes.
    """
    if size % 2:
        raise ValueError(f"rotary positions turn pairs of channels: heads must have an even size, got {size}")
    pairs, axes = size // 2, positions.shape[-1]
    if pairs < axes:
        raise ValueError(f"rotary positions need a pair of channels for each of {axes} axes: heads of {2 * axes}, got {size}")
    axis = jnp.arange(pairs) % axes
    frequency = base ** (-(jnp.arange(pairs) // axes) / -(-pairs // axes))
    angle = (positions.astype(jnp.float32)[..., axis] * frequency)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def _turned(x, cos, sin):
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)


@jax.custom_vjp
def rotary(x: Float[Array, "B T H C"], turn: tuple[Array, Array]) -> Float[Array, "B T H C"]:
    """x turned by `rotation`: afterwards a query and a key meet by the difference of their positions alone, axis by axis."""
    return _turned(x, *turn)


# Gradients are turned back; positions, which are integers, have none.
rotary.defvjp(lambda x, turn: (_turned(x, *turn), turn), lambda turn, g: (_turned(g, turn[0], -turn[1]), None))
