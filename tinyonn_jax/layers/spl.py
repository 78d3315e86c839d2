"""SPL, sparse proto linear: a linear layer whose every neuron is a module that each token switches on or off.

    soft (seed 0):  w_no = relu(cos(x_n, proto_o) − x_n·gate_oᵀ)        hard (seed 4):  w_no = 1[logit_no > 0]
    y_no = act(x_n·mu_oᵀ + bias_o) · w_no                               other matches and costs: see `RouterConfig`

Neurons are many, so all of them are candidates and keep their places (`Routing.index` None), and nothing of size N × O × I is
ever formed: a neuron's gradient from one token is δ_no·x_n, with δ = dL/d(x·muᵀ + bias); its norm is the product |δ_no|·‖x_n‖.

Letters: N tokens, I inputs, O neurons (the modules M of the router).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinyonn_jax.layers import routing
from tinyonn_jax.layers.base import Param, contract_rows, normal, tokens_of, valid_of, zeros
from tinyonn_jax.layers.tap import NeuronTap


@dataclass(frozen=True)
class Config:
    """Inputs I, the router (its modules are the O neurons; select relu or hard), and whether neurons apply silu."""

    inputs: int
    router: routing.RouterConfig
    activation: bool = True


@flax.struct.dataclass
class Neurons:
    """The neurons: `mu [O,I]` and `bias [O]`."""

    mu: Any
    bias: Any


@flax.struct.dataclass
class Params:
    """Router (seed: proto_weight, gate_param) and neurons (seed: mu_weight, mu_bias)."""

    router: routing.Router
    modules: Neurons


def spec(cfg: Config) -> Params:
    """The parameters of an SPL, as `Param`s: mu and prototypes from N(0, 0.02²), bias and gates zero.

    Raises:
        ValueError: more slots than neurons.
    """
    neurons = cfg.router.modules
    return Params(
        router=routing.spec(cfg.inputs, cfg.router),
        modules=Neurons(mu=Param((neurons, cfg.inputs), (None, "embed"), normal(0.02)), bias=Param((neurons,), (None,), zeros)),
    )


def apply(
    params: Params,
    x: Float[Array, "N I"],
    cfg: Config,
    *,
    valid: Bool[Array, " N"] | None = None,
    tap: NeuronTap | None = None,
) -> tuple[Float[Array, "N O"], routing.Routing]:
    """The layer on x. Tokens where `valid` is false give zero.

    The gradient of the tap is δ of every token and neuron, ‖x‖ of every token, and of every neuron Σ_n δ² and ‖dL/dmu_o‖².

    Raises:
        ValueError: `x` or `valid` does not fit, or the router selects by neither relu nor hard.
    """
    x = tokens_of(x, cfg.inputs, 2)
    chosen = routing.route_all(params.router, x, cfg.router, valid_of(valid, x))
    mu, bias = params.modules.mu.astype(x.dtype), params.modules.bias.astype(x.dtype)
    return _neurons(cfg.activation, x, mu, bias, chosen.weight, chosen.valid, tap), chosen


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _neurons(activation, x, mu, bias, weight, valid, tap):
    return _neurons_fwd(activation, x, mu, bias, weight, valid, tap)[0]


def _act(activation, u):
    return jax.nn.silu(u) if activation else u


def _neurons_fwd(activation, x, mu, bias, weight, valid, tap):
    u = x @ mu.T + bias
    return _act(activation, u) * weight.astype(u.dtype), (x, mu, u, weight, valid, tap)


def _neurons_bwd(activation, saved, g):
    x, mu, u, weight, valid, tap = saved
    f, slope = jax.vjp(partial(_act, activation), u)
    (delta,) = slope(g * weight.astype(g.dtype))
    d_mu = contract_rows(delta, x)
    d_weight = (g * f).astype(jnp.float32)
    if tap is not None:
        token = jnp.where(valid, jnp.linalg.norm(x.astype(jnp.float32), axis=-1), 0)
        pull = delta.astype(jnp.float32)
        tap = NeuronTap(pull, token, jnp.sum(jnp.square(pull), 0), jnp.sum(jnp.square(d_mu), -1))
    return delta @ mu, d_mu.astype(mu.dtype), jnp.sum(delta, 0), d_weight, None, tap


_neurons.defvjp(_neurons_fwd, _neurons_bwd)
