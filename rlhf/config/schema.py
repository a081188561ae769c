"""Every knob of the three stages, with its unit, its range and its default.

The classes are the single source for validation, `--help`, the resolved config and the documentation; nothing else in the
tree repeats a default. What several stages share is in sections.py. What belongs to an engine (process count,
ZeRO stage, sharding) stays in its launch file and is not here.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf.config.sections import (
    Checkpoint,
    Count,
    Data,
    Fraction,
    FrozenCache,
    Lora,
    Model,
    NonFinite,
    Optimizer,
    Place,
    Positive,
    Report,
    Schedule,
    Section,
    TextReading,
    TrainingFiles,
    TrainingFp8,
)


class PpoOptimizer(Optimizer):
    lr: Positive = 1e-6
    """Peak learning rate of the actor."""
    critic_lr: Positive = 5e-6
    """Peak learning rate of the critic (and of the value head when the trunk is shared)."""
    eps: Positive = 1e-5
    """Added to the root of the second moment; 1e-5 as in the PPO papers' code (docs/ppo.md)."""


class PpoSchedule(Schedule):
    length: Count = 100
    """How long to train, counted in `unit`."""
    unit: Literal["steps", "epochs"] = "steps"
    """steps: PPO iterations, each one rollout and its updates; epochs: passes over the prompts."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    final: Fraction = 0.0
    """Learning rate at the end, as a part of the peak."""


class SftData(TextReading, TrainingFiles):
    packing: bool = False
    """Count `batch_size` and `micro_batch_size` in packs, not in rows: as many rows as `max_length` tokens hold, which makes
    steps of like size. Rows do not see each other."""


class PromptData(Data):
    eval_limit: Count = 256
    """How many of the held-out prompts to use, from the start of the file."""
    max_length: Count = 512
    """Longest prompt, in tokens."""


class PpoCheckpoint(Checkpoint):
    every: Annotated[int, Field(ge=0)] = 10
    """Iterations between training checkpoints; 0: only when a signal stops the run."""


class Stage(Section):
    """What every stage has."""

    output: Place
    """The run's directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Everything random follows from it."""
    precision: Literal["fp64", "fp32", "bf16"] = "fp32"
    """bf16: autocast over fp32 master weights; fp64 is for tests of equality."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more work."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of the trunk."""
    compile: bool = False
    """Compile the transformer layers (torch.compile): up to minutes at the start, then faster steps. On a CPU it needs a C++
    compiler."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each process; 0: OMP_NUM_THREADS where it is set, else the cores shared out evenly."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model. A Hub model must then be pinned to a commit (`id@40 hex digits`); of a
    directory the run records the digest of all its files."""
    max_hours: Positive | None = None
    """Save and stop (exit 143) after this many hours; the same command goes on."""
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    """Transformer layers at the bottom that are not trained, and with them the embeddings (and so an LM head that is tied to
    them); PPO keeps those once in memory for all roles that have the same ones. 0: everything is trained."""
    lora: Lora = Lora()
    fp8: TrainingFp8 = TrainingFp8()
    non_finite: NonFinite = NonFinite()
    checkpoint: Checkpoint = Checkpoint()
    report: Report = Report()

    @model_validator(mode="after")
    def _precise_or_fast(self) -> Stage:
        if self.fp8.recipe != "none" and self.precision == "fp64":
            raise ValueError("fp8.recipe must be `none` with precision `fp64`: that is for tests of equality")
        return self

    @model_validator(mode="after")
    def _what_is_compiled(self) -> Stage:
        if self.compile and self.fp8.recipe != "none":
            raise ValueError("compile must be false with fp8.recipe other than `none`: its layers are not for the compiler")
        return self

    @model_validator(mode="after")
    def _what_is_frozen(self) -> Stage:
        if self.lora.rank and self.frozen_layers:
            raise ValueError("frozen_layers must be 0 with lora.rank > 0: beneath LoRA every layer is frozen already")
        for field in ("dora", "base"):
            if not self.lora.rank and getattr(self.lora, field) != Lora.model_fields[field].default:
                raise ValueError(f"lora.{field} has no meaning with lora.rank 0, which trains all weights: set lora.rank")
        if self.lora.base != "plain" and self.lora.merge and self.trust_remote_code:
            raise ValueError("lora.merge must be false with lora.base `nf4` and trust_remote_code: it opens the model again")
        if self.lora.base != "plain" and self.fp8.recipe != "none":
            raise ValueError("fp8.recipe must be `none` with lora.base `nf4`: a weight is held in one format")
        return self


class SftConfig(Stage):
    """Supervised fine-tuning (or, on plain text, continued pre-training)."""

    model: Model
    data: SftData
    batch_size: Count = 64
    """Rows (packed: sequences) per optimizer step, over all processes."""
    micro_batch_size: Count = 8
    """Rows per forward pass of one process; changes memory and speed, not the result."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only before the first and after the last."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        if self.model.from_scratch and self.lora.rank and not self.lora.merge:
            raise ValueError(
                "lora.merge must be true with model.from_scratch: an adapter's random base would lie nowhere on disk"
            )
        return self


class RmConfig(Stage):
    """Reward model: Bradley-Terry on pairs."""

    model: Model
    data: Data
    batch_size: Count = 64
    """Pairs per optimizer step, over all processes."""
    micro_batch_size: Count = 8
    """Pairs per forward pass of one process (both sides go through together)."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()


class Roles(Section):
    actor: Place
    """The policy to improve: any model source, usually the SFT run."""
    reference: Place | None = None
    """The frozen policy of the KL penalty; none: the actor as it starts."""
    critic: Place | None = None
    """A reward model to start the critic from, head included; `zero`: the actor's trunk with a zero head; none: the reward
    model if it is one, else `zero`."""
    mode: Literal["separate", "shared", "adapters"] = "separate"
    """separate: actor and critic have a trunk each; shared: two heads on one trunk, the value head starts at zero; adapters:
    all roles are LoRA adapters on one frozen base, which is in memory once (docs/ppo.md)."""


def is_service(source: str) -> bool:
    """Whether a reward's source is the address of a service."""
    return "://" in source and not source.startswith("count:")


class Reward(Section):
    source: Place
    """A reward model (any model source), `count:TEXT` (how often TEXT's token occurs), a Python function: `module:function`
    or `file.py:function`, called with the arguments it names among prompts, responses; it returns one number per reply; or a
    service: `https://...` (docs/rewards.md)."""
    timeout_s: Positive = 60.0
    """A function or a service that takes longer for one call, in seconds, has failed. In several processes all tries of a call
    must end within the 10 minutes that the others wait."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a call that failed is made again before the run ends."""
    allow_private: bool = False
    """Let a service be on this machine or in a private network."""
    weight: float = 1.0
    """Scores are multiplied by it; a negative weight turns a reward into a penalty."""
    normalize: Literal["none", "running"] = "none"
    """running: subtract the mean and divide by the deviation of all scores so far."""
    clip: Positive | None = None
    """Scores are cut to [-clip, clip] after weighting and normalising."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """A reply that never ends: its score becomes `missing_eos_value`, is lowered by it, or stays."""
    missing_eos_value: float = -1.0
    """See `missing_eos`; for `subtract` a positive number is taken off."""

    @field_validator("source")
    @classmethod
    def _is_plain_address(cls, source: str) -> str:
        """The messages leave out the address: it may hold a password."""
        if not is_service(source):
            return source
        try:
            address = urlsplit(source)
            complete = bool(address.hostname) and (address.port is None or address.port > 0)
        except ValueError:  # brackets without an IPv6 address, a port that is no number
            raise ValueError("not an address; a service has the form https://host:port/path") from None
        if address.scheme not in ("http", "https") or not complete:
            raise ValueError(f"{address.scheme}:// is no service to ask; it has the form https://host:port/path")
        return source


class Rollout(Section):
    batch_size: Count = 64
    """Prompts per iteration, over all processes."""
    samples_per_prompt: Count = 1
    """Replies to each prompt."""
    max_new_tokens: Count = 128
    """Longest reply, in tokens."""
    generation_batch_size: Count = 64
    """Replies one process samples at a time; one that has ended makes room for the next prompt. Memory and speed only."""
    temperature: Positive = 1.0
    """Logits are divided by it, here and everywhere log-probabilities are computed."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens only; 0: from all. Log-probabilities stay those of the full softmax."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1: from all."""


class Kl(Section):
    coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty on the KL divergence from the reference, in score units per nat; 0: the reference is never run."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator in the reward (Schulman, "Approximating KL divergence")."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: `coef` follows the measured KL (Ziegler et al. 2019, section 2.2)."""
    target: Positive = 6.0
    """Adaptive: KL per reply to aim at, in nats."""
    horizon: Count = 10000
    """Adaptive: replies over which the coefficient adapts."""


class PpoAlgorithm(Section):
    epochs: Count = 4
    """Passes over each rollout batch."""
    minibatch_size: Count = 64
    """Replies per optimizer step, over all processes."""
    clip: Positive = 0.2
    """Policy ratio clipping range."""
    value_clip: Positive | None = 0.2
    """Clipping range of the value's change; none: off."""
    value_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value loss beside the policy loss."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    whiten: bool = True
    """Whiten advantages over all replies of the iteration and all processes."""
    target_kl: Positive | None = None
    """Stop an iteration's updates when the mean 0.5 * (log ratio)^2 of a minibatch passes this, in nats; none: never."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations at the start in which only the critic learns."""


class Evaluation(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Iterations between evaluations on the fixed prompts; 0: before the first and after the last."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0: greedy."""
    samples_per_prompt: Count = 1
    """Replies to each fixed prompt."""
    scorers: tuple[str, ...] = ()
    """More Python functions to score the replies with, beside the reward: `module:function` or `file.py:function`."""


class PpoConfig(Stage):
    """Proximal policy optimisation against a reward, with a learned critic and a KL penalty."""

    roles: Roles
    data: PromptData
    reward: Reward
    rollout: Rollout = Rollout()
    ppo: PpoAlgorithm = PpoAlgorithm()
    kl: Kl = Kl()
    frozen_cache: FrozenCache = FrozenCache()
    eval: Evaluation = Evaluation()
    micro_batch_size: Count = 8
    """Replies per forward pass of one process, in scoring and update alike."""
    optimizer: PpoOptimizer = PpoOptimizer()
    schedule: PpoSchedule = PpoSchedule()
    checkpoint: PpoCheckpoint = PpoCheckpoint()

    @model_validator(mode="after")
    def _consistent(self) -> PpoConfig:
        replies = self.rollout.batch_size * self.rollout.samples_per_prompt
        if self.ppo.minibatch_size > replies:
            raise ValueError(
                f"ppo.minibatch_size {self.ppo.minibatch_size} is more than the {replies} replies of an iteration "
                "(rollout.batch_size * rollout.samples_per_prompt)"
            )
        if left := replies % self.ppo.minibatch_size:
            legal = [size for size in range(1, replies + 1) if replies % size == 0]
            below = max(size for size in legal if size < self.ppo.minibatch_size)
            above = min(size for size in legal if size > self.ppo.minibatch_size)
            raise ValueError(
                f"ppo.minibatch_size {self.ppo.minibatch_size} does not divide the {replies} replies of an iteration: the last "
                f"optimizer step of each epoch would follow {left} replies alone; the nearest that do are {below} and {above}"
            )
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0 in PPO: the ratio of the first minibatch has to be exactly 1")
        if self.roles.mode == "shared" and self.roles.critic not in (None, "zero"):
            raise ValueError("roles.critic must be `zero` (or absent) with roles.mode `shared`: the value head starts at zero")
        if self.roles.mode == "shared" and self.lora.base != "plain":
            raise ValueError("lora.base must be `plain` with roles.mode `shared`: its critic is saved with the base's weights")
        if self.trust_remote_code and self.roles.mode != "separate":
            raise ValueError("roles.mode must be `separate` with trust_remote_code: others build models that bring no code")
        if self.roles.mode == "adapters" and not self.lora.rank:
            raise ValueError(
                "lora.rank must be more than 0 with roles.mode `adapters`: the actor and the critic are LoRA adapters"
            )
        return self


STAGES: dict[str, type[Stage]] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}

SHORT_FLAGS = {
    "model.path": "model",
    "roles.actor": "actor",
    "roles.critic": "critic",
    "roles.reference": "reference",
    "reward.source": "reward",
    "data.train": "data",
    "data.file": "data",
    "data.json_key": "json_key",
    "report.profile": "profile",
}
"""A config field -> the flag that is short for it, for the commands that have the field."""
