"""References that share no code with the package: float64 NumPy loops, and one copy of the weights for every (token, slot)."""

from typing import Any

import jax
import numpy as np

from tinyonn_jax.layers.base import Param, is_param
from tinyonn_jax.layers.routing import RouterConfig, Routing

# Float32 sums of a few dozen terms of size one, added in another order.
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}


def make(spec: Any, seed: int = 0) -> Any:
    """Random parameters for a spec, none of them special: gates are not zero, scales of norms not one. By NumPy: compiling the
    initialisers would take longer than most tests."""
    rng = np.random.default_rng(seed)

    def fill(p: Param) -> jax.Array:
        kind = len(p.shape) - (p.axes[0] == "layers")
        values = rng.normal(size=p.shape) * (0.3 if kind == 1 else p.shape[-2] ** -0.5)
        return jax.device_put((values + (kind == 1 and p.axes[-1] == "embed")).astype(np.float32))

    return jax.tree.map(fill, spec, is_leaf=is_param)


def hand_made(index, weight, active, modules: int, width: int = 1, valid=None, groups: int = 1, logits=None) -> Any:
    """A routing from tables; logits and input are random where no table is given."""
    rng = np.random.default_rng(0)
    index, weight, active = np.asarray(index, np.int32), np.asarray(weight, np.float32), np.asarray(active, bool)
    lead = index.shape[:-1]
    made = Routing(
        logits=np.asarray(rng.normal(size=(*lead, modules)) if logits is None else logits, np.float32),
        index=index,
        weight=np.where(active, weight, 0),
        active=active,
        input=rng.normal(size=(*lead, width)).astype(np.float32),
        valid=np.ones(lead, bool) if valid is None else np.asarray(valid),
        unrouted=np.zeros(lead, bool),
        config=RouterConfig(modules, index.shape[-1] // groups, groups),
    )
    return jax.device_put(made)


def by_module(values, routing: Routing) -> np.ndarray:
    """Slot values `[*R,N,K]` laid out by module `[*R,N,M]`, zero where unused: a loop."""
    values, index, active = (np.asarray(v) for v in (values, routing.index, routing.active))
    out = np.zeros((*values.shape[:-1], routing.logits.shape[-1]))
    for at in np.ndindex(values.shape):
        if active[at]:
            out[(*at[:-1], index[at])] += values[at]
    return out


def norms(tree: Any, lead: int) -> np.ndarray:
    """Euclidean norm over all leaves and all but their first `lead` axes."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.sqrt(sum(np.sum(leaf**2, axis=tuple(range(lead, leaf.ndim))) for leaf in leaves))


def copied(params: Any, index: jax.Array) -> Any:
    """One copy of its module's weights for every (token, slot): `[N,K,…]` from `[M,…]`."""
    return jax.tree.map(lambda p: p[index], params)


def summed(copies: Any, index, modules: int) -> Any:
    """Gradients of copies `[N,K,…]` added up into those of the modules `[M,…]`."""
    flat = np.asarray(index).reshape(-1)

    def add(leaf):
        out = np.zeros((modules, *leaf.shape[2:]))
        np.add.at(out, flat, np.asarray(leaf, np.float64).reshape(-1, *leaf.shape[2:]))
        return out

    return jax.tree.map(add, copies)
