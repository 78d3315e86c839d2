"""Which fields of a configuration do something: under which learning rule, in which kind of network."""

import dataclasses
from operator import attrgetter
from typing import Any

from tinyonn_jax.config import Config, Kind, LearningConfig, RuleName
from tinyonn_jax.layers.routing import weighing

OPTIONS_OF: dict[str, tuple[RuleName, ...]] = {
    **dict.fromkeys(("granularity", "prior_sign", "neuron_cost", "goodness_gate", "centre"), ("sars",)),
    **dict.fromkeys(("attract", "regress", "protect", "temperature", "l2", "renew"), ("msaps",)),
    "balance": ("sars", "backprop"),
}
"""The rules that have a use for an option."""

_DYNTRM = ("latent_heads", "active_heads", "experts", "active_experts", "expert_hidden", "shared_experts", "select", "weight")
FIELDS_OF: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(_DYNTRM, ("dyntrm",)),
    **dict.fromkeys(("match", "cost", "data_init"), ("dyntrm", "dfc", "dfc_hard")),
    "hidden": ("dense", "dfc", "dfc_hard"),
    "gated": ("dense", "dyntrm"),
    "prc": ("dfc", "dfc_hard"),
}
"""The kinds of network that have a use for a field, where not all have."""


def foreign(cfg: LearningConfig, rule: RuleName) -> dict[str, Any]:
    """The options that are set, but do nothing under this rule, with their defaults."""
    default = {f.name: f.default for f in dataclasses.fields(cfg)}
    others = [name for name, rules in OPTIONS_OF.items() if rule not in rules]
    return {name: default[name] for name in others if getattr(cfg, name) != default[name]}


def under(cfg: LearningConfig, rule: RuleName) -> LearningConfig:
    """The same under another rule, without what does nothing there."""
    return dataclasses.replace(cfg, rule=rule, **foreign(cfg, rule))


def idle(cfg: Config, base: Config) -> list[str]:
    """A line for every field that is not as in `base`, but does nothing beside the others, or not for all routers."""
    model, mesh = cfg.model, cfg.mesh
    kind = f"in a network of kind {model.kind}"
    where = {f"model.{name}": kind for name, kinds in FIELDS_OF.items() if model.kind not in kinds}
    if model.kind == "dyntrm" and model.select != "top_k":
        where["model.weight"] = f"with model.select {model.select}"
    if model.neurons and (model.recursed or model.depth == 1):
        where["model.prc"] = "in a network of one block"
    if model.depth == 1:
        where["model.inject"] = "with model.depth 1"
    if model.kind != "dyntrm":
        where["mesh.grouped"] = kind
    if mesh.expert == 1:
        where |= dict.fromkeys(("mesh.dispatch", "mesh.capacity"), "with mesh.expert 1")
    elif mesh.dispatch == "replicate":
        where["mesh.capacity"] = "with mesh.dispatch replicate"
    if cfg.learning.rule == "none":
        where |= dict.fromkeys(("optim.meta_lr", "optim.meta_clip"), "with learning.rule none")
    elif model.kind == "dense":
        taught = ("learning.rule", *(f"learning.{name}" for name in OPTIONS_OF), "optim.meta_lr", "optim.meta_clip")
        where |= dict.fromkeys(taught, kind)
    elif not model.neurons:
        where["learning.neuron_cost"] = kind
    elif cfg.learning.granularity == "module":
        where["learning.neuron_cost"] = "with learning.granularity module"
    if not cfg.learning.protect:
        where["learning.temperature"] = "with learning.protect false"
    if cfg.eval.decode != "search":
        where["eval.min_probability"] = f"with eval.decode {cfg.eval.decode}"
    if cfg.optim.matrices == "adamw":
        where["optim.muon_lr"] = "with optim.matrices adamw"
    if not cfg.data.augment:
        where["data.permute_zero"] = "with data.augment false"
    if not cfg.data.holdout:
        where["train.validate_every"] = "without data.holdout"
    changed = (name for name in where if attrgetter(name)(cfg) != attrgetter(name)(base))
    lines = [f"--{name.replace('_', '-')} does nothing {where[name]}" for name in changed]
    backprop = cfg.learning.rule == "backprop" != base.learning.rule
    if backprop and model.kind == "dyntrm" and weighing(model.select, model.weight) == "softmax":
        for modules, slots in (("heads", model.active_heads), ("experts", model.active_experts)):
            if slots == 1:
                lines.append(
                    f"--learning.rule backprop teaches no router of {modules}: with one for a token in each group "
                    f"(--model.active-{modules}) its weight is always one"
                )
    return lines
