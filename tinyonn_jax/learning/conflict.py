"""Gradient conflict: do a task loss and a regulariser pull the weights that they share in opposite directions?

    shared = weights on which both gradients g, r are non-zero            cosine = ⟨g, r⟩ / (‖g‖‖r‖) over the shared ones

−1 is plain opposition, 0 indifference. Where nothing is shared the cosine is undefined, which is what isolation is for. Whatever
minimises the sum of two losses is at −1: there the two gradients cancel, so −1 alone is no sign of trouble.

Source: seed 0 ("Gradient Signal Conflict"), seed 4 (isolation).
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinyonn_jax.learning import signals as surprise
from tinyonn_jax.learning.rule import LearningRule, MetaState, routers


@flax.struct.dataclass
class Meeting:
    """`cosine` of two gradients over the weights that both reach, NaN if there are none; and how many weights are reached by
    both (`shared`), by the task loss (`task`) and by the regulariser (`regulariser`)."""

    cosine: Float[Array, ""]
    shared: Int[Array, ""]
    task: Int[Array, ""]
    regulariser: Int[Array, ""]


def meet(task: Any, regulariser: Any) -> Meeting:
    """Where the gradients of two losses, trees of the same structure, meet, and at what angle. A weight is reached by a loss
    whose gradient on it is not exactly zero."""
    g, r = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)] or [jnp.zeros(0)]) for tree in (task, regulariser))
    shared = (g != 0) & (r != 0)
    # Divided by the largest first: squares of small gradients would vanish.
    g_shared, r_shared = (_scaled(jnp.where(shared, v, 0)) for v in (g, r))
    cosine = jnp.dot(g_shared, r_shared) / jnp.sqrt(jnp.dot(g_shared, g_shared) * jnp.dot(r_shared, r_shared))
    return Meeting(jnp.where(jnp.any(shared), cosine, jnp.nan), jnp.sum(shared), jnp.sum(g != 0), jnp.sum(r != 0))


def _scaled(v: Float[Array, " P"]) -> Float[Array, " P"]:
    return v / jnp.maximum(jnp.max(jnp.abs(v), initial=0.0), jnp.finfo(v.dtype).tiny)


def meta_gradient(loss_fn: Callable[..., Any], rule: LearningRule, params: Any, meta: MetaState, batch: Any) -> Any:
    """The gradient of a rule's objective on *every* parameter, also through the network that made the routings.

    The train step differentiates by the routers alone; a rule that lets a gradient through its routings would show here (`sars`
    and `msaps` read their inputs as constants). Signals are data: they are measured once and held fixed.
    `loss_fn(params, taps, batch) -> (loss, aux)` as for the train step.
    """
    taps = surprise.make_taps(jax.eval_shape(loss_fn, params, None, batch)[1].routings)
    tapped, aux = jax.grad(loss_fn, 1, has_aux=True)(params, taps, batch)
    signals = surprise.read(tapped, aux.routings)

    def objective(params):
        routings = loss_fn(params, None, batch)[1].routings
        return rule.objective(routers(params), routings, signals, meta)[0]

    return jax.grad(objective)(params)
