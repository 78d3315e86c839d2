"""Rows sent to the devices of their modules and back, under `shard_map`: all-to-all.

Each device has P pairs of a token and a module, and a queue of at most C of them for each of S shards of the modules, which are
also the devices that they come from: so each has S·C places for those of all. `forth` and `back` are each other's transpose, and
so each other's gradient.

Letters: P pairs, S shards, C room from one device to another, I width of a row.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyonn_jax.layers import grouped


def queues(index: Int[Array, "N K"], active: Bool[Array, "N K"], own: int, shards: int) -> tuple[grouped.Plan, Array, Array]:
    """The pairs sorted by the shard of their module, where each shard's begin `[S]`, and each pair's rank among them `[P]`."""
    to = jnp.where(active, index // own, 0)
    plan = grouped.plan(to, active, shards)
    start = jnp.cumsum(plan.sizes) - plan.sizes
    return plan, start, plan.inverse - jnp.sum(jnp.where(to.reshape(-1, 1) == jnp.arange(shards), start, 0), -1)


@flax.struct.dataclass
class Dense:
    """Queues travel at their full room: `source [S·C]` is the pair at each place, `place [P]` that of each pair (-1: none)."""

    source: Array
    place: Array
    axis: Any = flax.struct.field(pytree_node=False)

    def forth(self, rows: Array) -> Array:
        return self._swap(grouped.move(rows, self.source, self.place))

    def back(self, rows: Array) -> Array:
        return grouped.move(self._swap(rows), self.place, self.source)

    def _swap(self, rows: Array) -> Array:
        return jax.lax.all_to_all(rows, self.axis, 0, 0, tiled=True)


@flax.struct.dataclass
class Ragged:
    """Only what is in a queue travels. `start [S]`: where each queue begins among this device's sorted pairs; `got [S]`: how many
    come from each device; `home [S]`: where those began among that device's pairs."""

    plan: grouped.Plan
    start: Array
    got: Array
    home: Array
    room: int = flax.struct.field(pytree_node=False)
    axis: Any = flax.struct.field(pytree_node=False)

    def forth(self, rows: Array) -> Array:
        empty = jnp.zeros((self.got.size * self.room, *rows.shape[1:]), rows.dtype)
        there = jnp.full_like(self.start, jax.lax.axis_index(self.axis) * self.room)
        sizes = self.start, self.plan.sizes, there, self.got
        return jax.lax.ragged_all_to_all(rows[self.plan.order], empty, *sizes, axis_name=self.axis)

    def back(self, rows: Array) -> Array:
        empty = jnp.zeros((self.plan.order.size, *rows.shape[1:]), rows.dtype)
        here = jnp.arange(self.got.size, dtype=self.got.dtype) * self.room
        sizes = here, self.got, self.home, self.plan.sizes
        return jax.lax.ragged_all_to_all(rows, empty, *sizes, axis_name=self.axis)[self.plan.inverse]


Route = Dense | Ragged


@jax.custom_vjp
def forth(rows: Float[Array, "P *I"], route: Route) -> Float[Array, "S·C *I"]:
    """Each pair's row where its module is, zero at places that are left; its gradient comes back the same way."""
    return route.forth(rows)


@jax.custom_vjp
def back(rows: Float[Array, "S·C *I"], route: Route) -> Float[Array, "P *I"]:
    """The rows of this device's pairs, from where their modules are; zero for pairs that were not sent."""
    return route.back(rows)


forth.defvjp(lambda rows, route: (route.forth(rows), route), lambda route, g: (route.back(g), None))
back.defvjp(lambda rows, route: (route.back(rows), route), lambda route, g: (route.forth(g), None))


def route(index: Int[Array, "N K"], kept: Bool[Array, "N K"], own: int, room: int, name: Any, ragged: bool) -> Route:
    """How the kept pairs travel, at most `room` to each of the devices along the mesh axis `name`, which have `own` modules."""
    shards, pairs = jax.lax.axis_size(name), index.size
    plan, start, rank = queues(index, kept, own, shards)
    if ragged:
        got, home = (jax.lax.all_to_all(v, name, 0, 0, tiled=True) for v in (plan.sizes, start))
        return Ragged(plan, start, got, home, room, name)
    at = start[:, None] + jnp.arange(room)  # [S,C], sorted rows
    filled = jnp.arange(room) < plan.sizes[:, None]
    source = jnp.where(filled, plan.order[jnp.minimum(at, pairs - 1)], -1).reshape(-1)
    return Dense(source, jnp.where(kept.reshape(-1), (index // own).reshape(-1) * room + rank, -1), name)
