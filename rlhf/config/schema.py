"""Every knob of the stages, with its unit, its range and its default.

The classes are the single source for validation, `--help`, the resolved config and the documentation; nothing else in the
tree repeats a default. What several stages share is in sections.py, what belongs to sampling a policy and to scoring its
replies in policies.py and rewards.py. What belongs to an engine (process count, ZeRO stage, sharding) stays in its launch
file and is not here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.policies import (
    Alarms,
    Evaluation,
    Groups,
    Grpo,
    Kl,
    PolicyCheckpoint,
    PolicyOptimizer,
    PolicyRoles,
    PolicySchedule,
    PolicyUpdate,
    PpoAlgorithm,
    PpoOptimizer,
    PromptData,
    Ptx,
    Roles,
    Rollout,
)
from rlhf.config.preferences import DpoLoss, KtoLoss, PreferenceOptimizer, StartingPolicy
from rlhf.config.reward_models import RmData, RmLoss
from rlhf.config.rewards import Reward
from rlhf.config.sections import (
    Checkpoint,
    Count,
    Data,
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


class SftData(TextReading, TrainingFiles):
    packing: bool = False
    """Count `batch_size` and `micro_batch_size` in packs, not in rows: as many rows as `max_length` tokens hold, which makes
    steps of like size. Rows do not see each other."""


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
    """Reward model: Bradley-Terry on pairs, or on all pairs of several ranked replies to a prompt."""

    model: Model
    data: RmData
    loss: RmLoss = RmLoss()
    normalize: Literal["none", "chosen", "reference"] = "none"
    """After training, scale the head so that scores have mean 0 and deviation 1 on the best replies of `data.eval` (chosen) or
    on the answers of `data.reference`."""
    batch_size: Count = 64
    """Prompts per optimizer step, over all processes; a pair is a prompt with two replies."""
    micro_batch_size: Count = 8
    """Prompts per forward pass of one process (all replies to a prompt go through together)."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _what_is_normalised_on(self) -> RmConfig:
        if (self.normalize == "reference") != (self.data.reference is not None):
            raise ValueError("data.reference and normalize: reference need each other; give both or neither")
        if self.normalize == "chosen" and self.data.eval is None:
            raise ValueError("normalize: chosen needs held-out rows: give data.eval")
        return self


class DpoConfig(Stage):
    """Preference optimisation without rewards or samples: DPO, IPO, SimPO, ORPO on pairs."""

    model: StartingPolicy
    data: Data
    loss: DpoLoss = DpoLoss()
    batch_size: Count = 64
    """Pairs per optimizer step, over all processes."""
    micro_batch_size: Count = 8
    """Pairs per forward pass of one process (both sides go through together, their prompt once)."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    optimizer: PreferenceOptimizer = PreferenceOptimizer()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _starts_as_its_reference(self) -> DpoConfig:
        if self.model.reference is not None and not self.loss.referenced:
            raise ValueError(f"model.reference has no meaning with loss.kind {self.loss.kind}, which has no reference")
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0 in DPO: the policy has to start as exactly its reference")
        return self


class KtoConfig(Stage):
    """Preference optimisation on replies that were rated one by one: KTO."""

    model: StartingPolicy
    data: Data
    loss: KtoLoss = KtoLoss()
    batch_size: Count = 64
    """Replies per optimizer step, over all processes."""
    micro_batch_size: Count = 8
    """Replies per forward pass of one process."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    optimizer: PreferenceOptimizer = PreferenceOptimizer()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _starts_as_its_reference(self) -> KtoConfig:
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0 in KTO: the policy has to start as exactly its reference")
        return self


class PolicyStage(Stage):
    """What the stages have that sample from the policy they train."""

    roles: PolicyRoles
    data: PromptData
    reward: Reward
    rollout: Rollout = Rollout()
    kl: Kl = Kl()
    ptx: Ptx = Ptx()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay, per iteration, of a moving average of the actor's weights, which becomes a second result, `ema/`; 0: none."""
    frozen_cache: FrozenCache = FrozenCache()
    eval: Evaluation = Evaluation()
    alarms: Alarms = Alarms()
    micro_batch_size: Count = 8
    """Replies per forward pass of one process, in scoring and update alike."""
    schedule: PolicySchedule = PolicySchedule()
    checkpoint: PolicyCheckpoint = PolicyCheckpoint()

    @property
    def update(self) -> PolicyUpdate:
        """The section of this stage that says how the policy is updated."""
        raise NotImplementedError

    @property
    def replies(self) -> int:
        """Of an iteration."""
        return self.rollout.batch_size * self.rollout.samples_per_prompt

    def require_even(self, field: str) -> None:
        """Raises ValueError where minibatches do not divide the replies of an iteration."""
        replies, minibatch_size = self.replies, self.update.minibatch_size
        if minibatch_size > replies:
            raise ValueError(
                f"{field} {minibatch_size} is more than the {replies} replies of an iteration "
                "(rollout.batch_size * rollout.samples_per_prompt)"
            )
        if left := replies % minibatch_size:
            legal = [size for size in range(1, replies + 1) if replies % size == 0]
            below = max(size for size in legal if size < minibatch_size)
            above = min(size for size in legal if size > minibatch_size)
            raise ValueError(
                f"{field} {minibatch_size} does not divide the {replies} replies of an iteration: the last "
                f"optimizer step of each epoch would follow {left} replies alone; the nearest that do are {below} and {above}"
            )

    @model_validator(mode="after")
    def _engine_goes_with_the_rest(self) -> PolicyStage:
        on_adapters = isinstance(self.roles, Roles) and self.roles.mode == "adapters"
        if self.rollout.engine == "vllm" and (on_adapters or self.lora.base != "plain" or self.fp8.recipe != "none"):
            raise ValueError(
                "rollout.engine must be `native` or `hf` with roles.mode `adapters`, lora.base `nf4` or an fp8.recipe: a "
                "server is sent plain weights, and would sample another policy"
            )
        corrected = self.rollout.engine == "vllm" and self.update.importance_cap
        if self.rollout.overlap and (not corrected or self.rollout.replay):
            raise ValueError(
                "rollout.overlap needs rollout.engine `vllm`, a server that samples while this process updates, and an "
                "importance_cap, as its replies are of the weights before; and nothing to overlap is left in a replay"
            )
        if self.rollout.record and self.fp8.probe.fallback:
            raise ValueError("rollout.record must be false with fp8.probe.fallback, which may go on from other rollouts")
        if self.alarms.gold and not (self.eval.scorers and self.eval.every and self.data.eval):
            raise ValueError("alarms.gold needs data.eval, eval.every and eval.scorers, one of which gives that metric")
        if self.rollout.replay == self.output:
            raise ValueError("rollout.replay must be another run than output")
        return self

    @model_validator(mode="after")
    def _starts_at_one(self) -> PolicyStage:
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0 here: the ratio of the first minibatch has to be exactly 1")
        if self.kl.refresh_every and self.fp8.recipe == "delayed":
            raise ValueError(
                "fp8.recipe may not be `delayed` with kl.refresh_every: the reference's scales would not move with it"
            )
        if self.update.dual_clip and self.update.dual_clip <= 1 + (self.update.clip_high or self.update.clip):
            raise ValueError("dual_clip must be more than 1 + clip (or clip_high): it bounds what these leave unbounded")
        if self.kl.refresh_every and self.lora.rank:
            raise ValueError("kl.refresh_every must be 0 with lora.rank > 0: the reference has no adapter that could follow")
        return self


class PpoConfig(PolicyStage):
    """Proximal policy optimisation against a reward, with a learned critic and a KL penalty."""

    roles: Roles
    ppo: PpoAlgorithm = PpoAlgorithm()
    optimizer: PpoOptimizer = PpoOptimizer()

    @property
    def update(self) -> PpoAlgorithm:
        return self.ppo

    @model_validator(mode="after")
    def _consistent(self) -> PpoConfig:
        self.require_even("ppo.minibatch_size")
        if len(self.reward.models) > 1 and self.roles.critic is None and self.roles.mode != "shared":
            raise ValueError("roles.critic must be given with several reward models: one of them, or `zero`")
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


class GrpoConfig(PolicyStage):
    """Policy optimisation without a critic: a reply is compared with other replies to its prompt."""

    rollout: Groups = Groups()
    grpo: Grpo = Grpo()
    optimizer: PolicyOptimizer = PolicyOptimizer()

    @property
    def update(self) -> Grpo:
        return self.grpo

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        self.require_even("grpo.minibatch_size")
        alone = self.rollout.samples_per_prompt == 1
        if alone and self.grpo.estimator in ("grpo", "rloo", "reinforce++-baseline"):
            raise ValueError(
                f"rollout.samples_per_prompt must be more than 1 with grpo.estimator `{self.grpo.estimator}`: a reply is "
                "compared with the others to its prompt"
            )
        if self.grpo.estimator != "grpo" and self.grpo.scale != "group":
            raise ValueError(f"grpo.scale has no meaning with grpo.estimator `{self.grpo.estimator}`, only with `grpo`")
        if self.grpo.resample and self.grpo.estimator in ("reinforce++", "remax"):
            raise ValueError(
                f"grpo.resample must be 0 with grpo.estimator `{self.grpo.estimator}`, which learns from equal scores as well"
            )
        if self.grpo.resample and (self.rollout.overlap or self.rollout.record or self.rollout.replay):
            raise ValueError("grpo.resample must be 0 with rollout.overlap, record or replay: prompts are then chosen before")
        if self.rollout.replay and self.grpo.estimator == "remax":
            raise ValueError("rollout.replay knows no greedy replies, which grpo.estimator `remax` compares with")
        return self


STAGES: dict[str, type[Stage]] = {
    "sft": SftConfig,
    "rm": RmConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
}

SHORT_FLAGS = {
    "model.path": "model",
    "model.reference": "reference",
    "roles.actor": "actor",
    "roles.critic": "critic",
    "roles.reference": "reference",
    "reward.source": "reward",
    "judge.command": "judge",
    "data.train": "data",
    "data.file": "data",
    "data.json_key": "json_key",
    "report.profile": "profile",
    "rollout.record": "record",
    "rollout.replay": "replay",
}
"""A config field -> the flag that is short for it, for the commands that have the field."""
