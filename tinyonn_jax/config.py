"""Everything a run can be told: frozen dataclasses, validated on construction.

The docstring below each field is its `--help` line.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tinyonn_jax.layers.base import wrong_choices
from tinyonn_jax.layers.kernels import Choice
from tinyonn_jax.layers.routing import weighing

Kind = Literal["dense", "dyntrm", "dfc", "dfc_hard"]
RuleName = Literal["none", "backprop", "sars", "msaps"]
Dispatch = Literal["replicate", "all-to-all"]


class ConfigError(ValueError):
    """A configuration that cannot work; the message is one line that names the field and the remedy."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


_TYPES = {int: (int, "a whole number"), float: (int | float, "a number"), bool: (bool, "true or false"), str: (str, "text")}


def _require_types(config: Any, section: str) -> None:
    """Every field holds what its type says, one of its choices if they are named, and every number is finite."""
    for wrong in wrong_choices(config):
        raise ConfigError(f"{section}.{wrong}")
    for name, hint in get_type_hints(type(config)).items():
        value, many = getattr(config, name), get_origin(hint) is tuple
        kind = get_args(hint)[0] if many else hint
        if kind in _TYPES:
            required, said = _TYPES[kind]
            _require(not many or isinstance(value, tuple), f"{section}.{name} must be a tuple, got {value!r}")
            items: tuple[Any, ...] = value if many else (value,)
            for item in items:
                fits = isinstance(item, required) and (kind is bool or not isinstance(item, bool))
                _require(fits, f"{section}.{name} must be {said}, got {item!r}")
                _require(
                    kind is not float or -sys.float_info.max <= item <= sys.float_info.max,
                    f"{section}.{name} must be finite, got {item}",
                )


@dataclass(frozen=True)
class ModelConfig:
    """The network: what is computed."""

    kind: Kind = "dyntrm"
    """dense: nothing is routed; dyntrm: attention heads and experts; dfc: neurons, weighed by logits; dfc_hard: on or off."""
    dim: int = 128
    """Model width D, in channels."""
    heads: int = 4
    """Attention heads (dense, dfc), or physical key/value groups G (dyntrm)."""
    head_dim: int = 32
    """Size C of one attention head, in channels; even, at least 6 (three rotary axes)."""
    latent_heads: int = 16
    """Latent heads H in the library, over all groups (dyntrm); a multiple of --model.heads."""
    active_heads: int = 1
    """Latent heads each token uses per group (dyntrm)."""
    hidden: int = 384
    """Hidden width of the MLP (dense), or hidden neurons of MoIE (dfc; 0: no feed-forward layer)."""
    experts: int = 8
    """Experts E in the library (dyntrm)."""
    active_experts: int = 2
    """Experts each token uses, K: exactly (top_k) or at most (relu, hard, threshold)."""
    expert_hidden: int = 192
    """Hidden width F of one expert, in channels."""
    shared_experts: int = 0
    """Experts that every token uses besides the routed ones (dyntrm)."""
    gated: bool = True
    """Gated (SwiGLU) MLPs and experts instead of plain silu."""
    match: Literal["cosine", "dot"] = "cosine"
    """How tokens are matched with prototypes: cosine similarity, or dot product over the square root of D."""
    cost: Literal["auto", "bias", "bias_drln", "linear", "threshold"] = "auto"
    """Taken off the match: a bias, a normalised bias, linear in the token, a sigmoid; auto: linear for dfc, else bias."""
    select: Literal["top_k", "relu", "hard", "threshold"] = "top_k"
    """Which modules a token uses: the k best, or those whose logit is above zero (dfc always relu, dfc_hard always hard)."""
    weight: Literal["softmax", "relu", "hard"] = "softmax"
    """Weights of selected modules under top_k: softmax over their logits, their positive part, or one."""
    depth: int = 4
    """Recursions R of the one block (recursed), or number of blocks L (stacked)."""
    recursed: bool = True
    """One block applied `depth` times; false: `depth` blocks with parameters of their own."""
    data_init: bool = False
    """Prototypes start as inputs of random tokens of the first batch, not at random."""
    prc: bool = True
    """Refine each block's prototypes from those of the block before (dfc and dfc_hard with model.recursed false)."""
    inject: bool = True
    """Add the embedded input again at every recursion."""
    recursion_embedding: bool = False
    """Add a learned embedding of the recursion to every token, so that the one block can tell them apart (model.recursed)."""
    short_conv: int = 0
    """Tokens before it that each token also reads, channel by channel, ahead of attention and of the feed-forward; 0: none."""
    deep_supervision: float = 0.0
    """Weight of the loss at earlier recursions against the last; 0 trains the last one alone."""
    remat: bool = False
    """Recompute a block in the backward pass instead of storing it: less memory, about a third more time."""
    task_embedding: bool = True
    """Add a learned embedding of the task to every token (data.format pair); false works on unseen tasks."""
    rope_base: float = 100.0
    """Base b of the rotary positions: along an axis wavelengths rise from 2 pi cells towards 2 pi b (46 of 100, heads of 32)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations; parameters, norms, softmax and signals stay float32. float16 overflows sooner: no loss is scaled."""

    def __post_init__(self):
        _require_types(self, "model")
        for name in ("dim", "heads", "head_dim", "hidden", "experts", "active_experts", "expert_hidden", "depth"):
            least = 0 if name == "hidden" and self.neurons else 1
            _require(getattr(self, name) >= least, f"model.{name} must be at least {least}, got {getattr(self, name)}")
        _require(
            self.head_dim % 2 == 0 and self.head_dim >= 6, f"model.head_dim must be even and at least 6, got {self.head_dim}"
        )
        _require(
            not self.recursion_embedding or (self.recursed and self.depth > 1),
            "model.recursion_embedding tells recursions of one block apart: "
            + ("model.depth 1 has only one" if self.recursed else "stacked blocks (--model.no-recursed) are no recursions")
            + "; add --model.no-recursion-embedding",
        )
        _require(self.rope_base > 0, f"model.rope_base must be positive, got {self.rope_base}")
        for name in ("shared_experts", "short_conv"):
            _require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
        _require(0.0 <= self.deep_supervision <= 1.0, f"model.deep_supervision must lie in [0, 1], got {self.deep_supervision}")
        _require(
            self.deep_supervision == 0 or self.depth > 1,
            "model.deep_supervision is the loss of earlier recursions, and model.depth 1 has none: leave it out or go deeper",
        )
        _require(
            not self.neurons or self.dim == self.heads * self.head_dim,
            f"model.dim ({self.dim}) must be model.heads × model.head_dim ({self.heads} × {self.head_dim}) for kind {self.kind}",
        )
        above_zero = self.neurons or self.select in ("relu", "hard") or (self.select == "top_k" and self.weight == "relu")
        _require(
            self.cost != "threshold" or self.kind == "dense" or not above_zero,
            "model.cost threshold starts at a half, above most matches, and modules that need a logit above zero would never be "
            "active: take another cost, or (dyntrm) model.select threshold, or top_k with model.weight softmax or hard",
        )
        if self.kind == "dyntrm":
            _require(
                self.latent_heads % self.heads == 0,
                f"model.latent_heads ({self.latent_heads}) must be a multiple of model.heads ({self.heads})",
            )
            _require(
                1 <= self.active_heads <= self.latent_heads // self.heads,
                f"model.active_heads ({self.active_heads}) must lie between 1 and model.latent_heads / model.heads "
                f"({self.latent_heads // self.heads})",
            )
            _require(
                self.active_experts <= self.experts,
                f"model.active_experts ({self.active_experts}) must not exceed model.experts ({self.experts}); lower it, or "
                "raise --model.experts",
            )

    @property
    def graded(self) -> bool:
        """Whether weights of selected modules follow their logits (dyntrm), somewhere: a softmax over one alone is always one."""
        weight = weighing(self.select, self.weight)
        return weight == "relu" or (weight == "softmax" and max(self.active_heads, self.active_experts) > 1)

    @property
    def neurons(self) -> bool:
        """Whether single neurons are the modules."""
        return self.kind in ("dfc", "dfc_hard")


@dataclass(frozen=True)
class LearningConfig:
    """The learning rule of the routers."""

    rule: RuleName = "sars"
    """none: routers stay as initialised; backprop: from the main loss; sars, msaps: from surprise."""
    granularity: Literal["module", "token"] = "token"
    """sars: surprise measured per module over the batch, or per token where it can use several of a group."""
    prior_sign: Literal["bayes", "reinforce"] = "reinforce"
    """sars: prior = logits minus goodness (bayes, the derivation) or plus goodness (reinforce)."""
    neuron_cost: Literal["module", "token"] = "module"
    """sars, dfc: a neuron's cost at granularity token; per token it says the same as its importance, so module is the default."""
    goodness_gate: bool = False
    """sars: apply a module's main gradient only where its mean goodness is positive; of few modules (dyntrm) most stand still."""
    attract: bool = True
    """msaps: prototypes move towards the tokens they serve, or away (prototype loss)."""
    regress: bool = True
    """msaps: gates learn to predict surprise (gate loss)."""
    protect: bool = True
    """msaps: prototypes of modules with small gates move less."""
    temperature: float = 0.5
    """msaps: protection's temperature at accuracy zero; smaller protects fewer modules."""
    l2: float = 1e-4
    """msaps: adaptive decay of prototypes and modules, times their mean norm; 0 turns it off. A part of the gradient: what has no
    other gradient shrinks at the optimizers' pace, whatever the weight is."""
    renew: float = 1e-4
    """msaps: modules whose activation rate falls below this get a new prototype; 0 turns it off. The rate is a moving average
    that starts at one half: at the default a module that nobody uses is made anew after about 850 steps."""
    balance: float = 0.0
    """sars, backprop: weight of a loss that is least when all modules serve as many tokens; 0 turns it off."""
    centre: bool = False
    """sars: entropy moves no module's mean logit over a batch: routers learn what tokens differ in, not whom all prefer."""
    pi_alpha: float = 0.1
    """Predictive integrity PI = exp(-alpha (loss / tau + gamma surprise)): alpha."""
    pi_gamma: float = 1.0
    """Predictive integrity: gamma, the weight of surprise, which is the gradient of a mean over tokens and so falls with their
    number: at 1 this part is below a thousandth."""

    def __post_init__(self):
        _require_types(self, "learning")
        for name in ("l2", "renew"):
            _require(getattr(self, name) >= 0, f"learning.{name} must not be negative, got {getattr(self, name)}")
        _require(self.temperature > 0, f"learning.temperature must be positive, got {self.temperature}")
        _require(self.balance >= 0, f"learning.balance must not be negative, got {self.balance}")
        _require(
            self.pi_alpha > 0 and self.pi_gamma >= 0, "learning.pi_alpha must be positive and learning.pi_gamma not negative"
        )


@dataclass(frozen=True)
class OptimConfig:
    """Two optimizers: main (modules) and meta (routers)."""

    matrices: Literal["muon", "adamw"] = "muon"
    """Optimizer of main matrices; everything else in the main group uses AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    lr: float = 3e-3
    """Peak learning rate of AdamW in the main group: embeddings, norms, head; with optim.matrices adamw the matrices too."""
    weight_decay: float = 0.1
    """Decoupled weight decay of main matrices."""
    clip: float = 1.0
    """Largest global gradient norm of the main group; 0 turns clipping off."""
    meta_lr: float = 3e-3
    """Peak learning rate of the routers (AdamW)."""
    meta_clip: float = 1.0
    """Largest global gradient norm of the meta group; 0 turns clipping off."""
    warmup: float = 0.02
    """Share of the steps with rising learning rate."""
    decay_from: float = 0.5
    """Share of the steps after which the learning rate falls linearly to zero; skipped steps do not count."""
    ema: float = 0.995
    """Decay of the moving average of the parameters, which is what gets evaluated."""
    max_skipped: int = 20
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""

    def __post_init__(self):
        _require_types(self, "optim")
        _require(
            0 <= self.warmup <= self.decay_from <= 1,
            f"optim.warmup ({self.warmup}) and optim.decay_from ({self.decay_from}) must satisfy 0 <= warmup <= decay_from <= 1",
        )
        _require(0 <= self.ema < 1, f"optim.ema must lie in [0, 1), got {self.ema}")
        for name in ("muon_lr", "lr", "meta_lr", "clip", "meta_clip", "weight_decay"):
            _require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        _require(self.max_skipped >= 1, f"optim.max_skipped must be at least 1, got {self.max_skipped}")


@dataclass(frozen=True)
class DataConfig:
    """The tasks: what is learned from and what is scored."""

    train: tuple[str, ...] = ("arc1",)
    """Training sources: arc1, arc2 (their training splits), arc1/evaluation or the like, a folder, a Kaggle *_challenges.json."""
    eval: str = "arc1/training"
    """Scored source: arc1, arc2 (their evaluation splits), arc1/training, a folder, or a Kaggle *_challenges.json."""
    max_grid: int = 0
    """Keep only tasks whose every grid is at most this many cells high and wide; 0 keeps all."""
    smallest: int = 0
    """Keep only this many tasks per source, those with the fewest tokens in their mean demonstration; 0 keeps all."""
    format: Literal["pair", "context"] = "pair"
    """pair: one pair a sequence, with a task embedding; context: all demonstrations, then the test input."""
    holdout: bool = False
    """Hold out one demonstration of every task that has at least three, and validate on those."""
    augment: bool = True
    """Train under random dihedral transforms and colour permutations."""
    permute_zero: bool = False
    """Let colour permutations move colour 0 as well."""
    buckets: tuple[int, ...] = (32, 48, 64, 96, 128, 160, 192, 224)
    """Sequence lengths that are compiled, in tokens, rising."""
    tokens_per_batch: int = 2048
    """Padded tokens in one batch; must be at least the longest bucket."""
    sequence: int = 0
    """Stages that tasks are dealt to and learned in one after another, train.steps / data.sequence steps each; 0 mixes all."""
    drop_overlap: bool = False
    """Leave out training tasks and pairs that are also scored, instead of refusing to start."""
    skip_invalid: bool = False
    """Train on the valid tasks and report how many were skipped, instead of refusing to start."""

    def __post_init__(self):
        _require_types(self, "data")
        _require(len(self.train) > 0, "data.train must name at least one source")
        _require(
            len(self.buckets) > 0
            and all(a < b for a, b in zip(self.buckets, self.buckets[1:], strict=False))
            and self.buckets[0] > 0,
            f"data.buckets must be positive and rising, got {self.buckets}",
        )
        _require(
            self.tokens_per_batch >= max(self.buckets),
            f"data.tokens_per_batch ({self.tokens_per_batch}) must be at least the longest of data.buckets ({max(self.buckets)})",
        )
        _require(0 <= self.max_grid <= 30, f"data.max_grid must lie between 0 and 30, got {self.max_grid}")
        _require(self.smallest >= 0, f"data.smallest must not be negative, got {self.smallest}")
        _require(self.sequence == 0 or self.sequence >= 2, f"data.sequence must be 0 or at least 2, got {self.sequence}")
        _require(not (self.sequence and self.holdout), "data.holdout must be false with data.sequence: stages are tested instead")


@dataclass(frozen=True)
class TrainConfig:
    """The budget of a run and what it writes."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """The one random seed: parameters, order of the data and augmentation follow from it."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    validate_every: int = 0
    """Steps between validations on held-out demonstrations (data.holdout), 0: at the end only. In stages: after each."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best."""

    def __post_init__(self):
        _require_types(self, "train")
        for name in ("steps", "log_every", "checkpoint_every", "keep"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        _require(0 <= self.seed < 2**32, f"train.seed must lie between 0 and 2³² - 1, got {self.seed}")
        _require(self.steps < 2**31, f"train.steps must be less than 2³¹, got {self.steps}")
        _require(self.validate_every >= 0, f"train.validate_every must not be negative, got {self.validate_every}")


@dataclass(frozen=True)
class EvalConfig:
    """How a trained model is scored."""

    augmentations: int = 16
    """Views of each test input that vote; the first is always the input itself."""
    decode: Literal["greedy", "search"] = "greedy"
    """greedy: one completion a view; search: every completion above eval.min_probability."""
    min_probability: float = 0.1
    """search: completions at least this probable are found and vote; 0.001 or more."""
    finalists: int = 0
    """Candidates with most votes that are ranked anew, by their mean log-probability in every view; 0: votes decide alone."""
    batch: int = 64
    """Sequences decoded side by side, and the most that are scored at once."""
    entropy_stop: float = 0.0
    """A token stops recursing once its output entropy is below this, in nats; 0 uses every recursion."""
    blank_task: bool = False
    """Replace the task embedding by zero, to measure how much the score leans on it."""

    def __post_init__(self):
        _require_types(self, "eval")
        _require(1 <= self.augmentations <= 10_000, f"eval.augmentations must be 1 to 10,000, got {self.augmentations}")
        _require(0.001 <= self.min_probability <= 1, f"eval.min_probability must lie in [0.001, 1], got {self.min_probability}")
        _require(
            self.finalists == 0 or self.finalists >= 2,
            f"eval.finalists must be 0, or at least 2 for there to be an order among them, got {self.finalists}",
        )
        _require(self.batch >= 1, f"eval.batch must be at least 1, got {self.batch}")
        _require(self.entropy_stop >= 0, f"eval.entropy_stop must not be negative, got {self.entropy_stop}")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged and used: may change from start to start."""

    data: int = 0
    """Devices along which the batch is split; 0 takes all that remain."""
    fsdp: int = 1
    """Devices along which batch and parameters are split."""
    expert: int = 1
    """Devices that share the experts and latent heads (dyntrm); must divide --model.experts and --model.latent-heads."""
    grouped: Choice = "auto"
    """Kernel of routed modules: loop (auto on CPUs), pallas (NVIDIA), padded (other GPUs), ragged (TPUs), tokamax; dense: all."""
    dispatch: Dispatch = "replicate"
    """Along mesh.expert, replicate: devices have the same tokens; all-to-all: each has its own and sends them to the experts."""
    capacity: float = 2.0
    """all-to-all: most tokens from one device to another in training, in even shares; those beyond are dropped, and counted."""

    def __post_init__(self):
        _require_types(self, "mesh")
        _require(
            self.data >= 0 and self.fsdp >= 1 and self.expert >= 1,
            "mesh.data must not be negative, mesh.fsdp and mesh.expert at least 1",
        )
        _require(self.capacity > 0, f"mesh.capacity must be positive, got {self.capacity}")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    learning: LearningConfig = field(default_factory=LearningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        _require(
            not (self.model.task_embedding and self.data.format == "context"),
            "model.task_embedding must be false with data.format context: the demonstrations take its place",
        )
        _require(
            self.learning.rule != "backprop"
            or self.model.kind == "dense"
            or self.model.kind == "dfc"
            or (self.model.kind == "dyntrm" and self.model.graded),
            "learning.rule backprop needs weights with a gradient, "
            + (
                "and neurons of kind dfc_hard are on or off: take model.kind dfc, or another rule"
                if self.model.kind == "dfc_hard"
                else "set model.select to relu, to top_k with model.weight relu, or to top_k or threshold with more than one "
                "active expert or head"
            ),
        )
        if self.mesh.expert > 1:
            model, split = self.model, self.mesh.expert
            _require(model.kind == "dyntrm", f"mesh.expert ({split}) needs model.kind dyntrm: {model.kind} has no experts")
            _require(
                model.experts % split == 0 and model.latent_heads % split == 0,
                f"mesh.expert ({split}) must divide model.experts ({model.experts}) and model.latent_heads "
                f"({model.latent_heads})",
            )
        _require(
            not self.data.sequence or self.train.steps % self.data.sequence == 0,
            f"train.steps ({self.train.steps}) must be a multiple of data.sequence ({self.data.sequence})",
        )
        _require(
            not self.eval.blank_task or self.model.task_embedding,
            "eval.blank_task blanks the task embedding, and a network with model.task_embedding false has none: leave it out",
        )
        _require(
            self.eval.entropy_stop == 0 or self.model.recursed,
            "eval.entropy_stop needs model.recursed: stacked blocks have no early answer",
        )
