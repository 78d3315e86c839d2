"""How routers learn: pure functions of surprise signals; no layer code, no I/O."""

from tinyonn_jax.learning.msaps import msaps
from tinyonn_jax.learning.rule import LearningRule, MetaState, backprop, none
from tinyonn_jax.learning.sars import sars

__all__ = ["LearningRule", "MetaState", "backprop", "msaps", "none", "sars"]
