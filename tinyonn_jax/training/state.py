"""Everything a run needs to go on from where it stopped, as arrays."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from tinyonn_jax.learning.rule import MetaState


@flax.struct.dataclass
class TrainState:
    """`step` done so far; `params` and their moving average `ema`; both optimizers' `opt_state`; `meta` of the learning rule;
    `rng` key data; `skipped`: consecutive steps skipped for a non-finite loss or gradient, `skipped_total` all of them."""

    step: Int[Array, ""]
    params: Any
    opt_state: optax.OptState
    meta: MetaState
    ema: Any
    rng: Array
    skipped: Int[Array, ""]
    skipped_total: Int[Array, ""]

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation, meta: MetaState, seed: int = 0) -> "TrainState":
        """The state before the first step. It holds copies of `params`: steps donate their state, which must hold no buffer twice
        (optimizers may keep parameters too), and none that is used elsewhere."""

        def copied() -> Any:
            return jax.tree.map(jnp.copy, params)

        return cls(
            step=jnp.int32(0),
            params=copied(),
            opt_state=tx.init(copied()),
            meta=meta,
            ema=copied(),
            rng=jax.random.key_data(jax.random.key(seed)),
            skipped=jnp.int32(0),
            skipped_total=jnp.int32(0),
        )
