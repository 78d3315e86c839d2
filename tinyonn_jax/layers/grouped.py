"""Grouped matmul: rows sorted by module times one weight per module; dropless, with its own gradient rule.

The (token, slot) pairs are sorted by module, so that module m's rows are consecutive; pairs of idle slots come last and are
never computed. `matmul` is one function over several `kernels` that agree to rounding; the platform's own runs unless another is
chosen with `using`.

Letters: N tokens, K slots, P = N·K pairs, M modules, I inputs, O outputs of one module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.layers import deferred, kernels
from tinyonn_jax.layers.kernels import Choice, Kernel

PLATFORMS: dict[str, Kernel] = {"cpu": "loop", "cuda": "pallas", "rocm": "padded", "default": "ragged"}
"""The kernel of each platform; `default` for all others. For GPUs XLA makes of `lax.ragged_dot` every module on every row."""

EXPORTED: dict[str, Kernel] = {**PLATFORMS, "cuda": "padded"}
"""The same where there is no GPU: Pallas takes long to trace, and compiles for a GPU at hand only."""

COUNTED = 64
"""Up to so many modules pairs are sorted by counting; on a CPU that costs as much as comparing at about a hundred."""

_choice: ContextVar[Choice] = ContextVar("grouped", default="auto")


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """What is traced within (or by a function decorated with it) runs on this kernel; auto: on the platform's own.

    `jax.jit` traces a function once for arguments of one kind: what it has traced before stays on the kernel of then.
    """
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def chosen(choice: Choice, platform: str) -> Kernel:
    """What a choice comes down to on a platform."""
    own = PLATFORMS.get("cuda" if platform == "gpu" else platform, PLATFORMS["default"])
    return own if choice == "auto" else choice


def title(choice: Choice, platform: str) -> str:
    """The same in words."""
    return kernels.TITLES[chosen(choice, platform)]


def loops() -> bool:
    """Whether what is traced here runs as a loop over blocks, on this machine's own devices."""
    return chosen(_choice.get(), jax.default_backend()) == "loop"


@flax.struct.dataclass
class Plan:
    """The sorted order of P pairs: `order[row]` the pair at a row, `inverse[pair]` its row, `sizes[m]` the rows of module m."""

    order: Int[Array, " P"]
    inverse: Int[Array, " P"]
    sizes: Int[Array, " M"]


@flax.struct.dataclass
class Tap:
    """Zeros whose gradients are squared norms: of each row's own weight gradient `rows [P]`, of each module's `modules [M]`."""

    rows: Float[Array, " P"]
    modules: Float[Array, " M"]


def plan(index: Int[Array, "N K"], active: Bool[Array, "N K"], modules: int) -> Plan:
    """Sorts the pairs by module, stably, idle ones last: by counting where modules are few, for that takes P·M steps."""
    key = jnp.where(active, index, modules).reshape(-1)
    row = jnp.arange(key.size, dtype=jnp.int32)
    invert = lambda p: jnp.zeros_like(row).at[p].set(row, unique_indices=True)  # noqa: E731
    if modules <= COUNTED:
        hit = (key[:, None] == jnp.arange(modules + 1)).astype(jnp.int32)  # [P,M+1]
        count = jnp.cumsum(hit, 0)
        sizes = count[-1]
        inverse = jnp.sum(hit * (jnp.cumsum(sizes) - sizes + count - 1), -1)
        return Plan(invert(inverse), inverse, sizes[:modules])
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    end = jnp.searchsorted(key[order], jnp.arange(modules), side="right").astype(jnp.int32)
    return Plan(order, invert(order), jnp.diff(end, prepend=0))


@jax.custom_vjp
def permute(x: Float[Array, "P *I"], order: Int[Array, " P"], inverse: Int[Array, " P"]) -> Float[Array, "P *I"]:
    """x[order] for a permutation; its gradient is the gather with `inverse`, not a scatter."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


@jax.custom_vjp
def move(x: Float[Array, "P *I"], source: Int[Array, " Q"], place: Int[Array, " P"]) -> Float[Array, "Q *I"]:
    """x[source], zero where there is none (-1). `place` is its inverse, -1 for rows that go nowhere; the gradient moves by it."""
    return _moved(x, source)


def _moved(x, source):
    rows = x[jnp.maximum(source, 0)]
    return jnp.where((source >= 0).reshape(-1, *(1,) * (x.ndim - 1)), rows, 0)


move.defvjp(lambda x, source, place: (_moved(x, source), place), lambda place, g: (_moved(g, place), None, None))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(slots: int, x: Array, p: Plan) -> Array:
    return x[p.order // slots]


_spread.defvjp(
    lambda slots, x, p: (x[p.order // slots], p.inverse),
    lambda slots, inverse, g: (g[inverse].reshape(-1, slots, g.shape[-1]).sum(1), None),
)


def dispatch(x: Float[Array, "N I"], p: Plan) -> Float[Array, "P I"]:
    """Every token's row once for each of its slots, in sorted order; the gradient gathers the slots back and sums them."""
    return _spread(p.order.size // x.shape[0], x, p)


def matmul(
    x: Float[Array, "P I"],
    w: Float[Array, "M I O"] | deferred.Weight,
    sizes: Int[Array, " M"],
    tap: Tap | None = None,
) -> Float[Array, "P O"]:
    """Row p times the weight of its module; rows past sum(sizes) give zero.

    The gradient of `tap`, if given, is for each row the squared norm of the weight gradient that this row alone causes,
    ‖x_p‖²·‖dL/dy_p‖² (exact: it is an outer product), and for each module ‖dL/dw_m‖², both float32. The gradient of a
    `deferred.Weight`, and those norms of its modules, go to its port.
    """
    if isinstance(w, deferred.Weight):
        return deferred.matmul(x, w, sizes, None if tap is None else tap.rows)
    return _matmul(_choice.get(), x, w, sizes, tap)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(choice, x, w, sizes, tap):
    return _run(choice, lambda kernel: kernel.forward, x, w, sizes)


def _matmul_fwd(choice, x, w, sizes, tap):
    return _run(choice, lambda kernel: kernel.forward, x, w, sizes), (x, w, sizes, tap)


def _matmul_bwd(choice, saved, g):
    x, w, sizes, tap = saved
    dx, dw, rows, modules = _run(choice, lambda kernel: partial(kernel.backward, tap is not None), x, w, sizes, g)
    return dx, dw, None, None if tap is None else Tap(rows, modules)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _run(choice: Choice, part, *args):
    """A part of the chosen kernel."""
    if choice == "auto":
        platforms = PLATFORMS if jax.default_backend() == "gpu" else EXPORTED
        return lax.platform_dependent(*args, **{name: part(kernels.load(kernel)) for name, kernel in platforms.items()})
    return part(kernels.load(choice))(*args)
