"""Sections of the stages that sample from the policy they train: who takes part, how it is sampled, what bounds its steps."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.config.sections import Checkpoint, Count, Data, Fraction, Optimizer, Place, Positive, Schedule, Section, TextReading


class PolicyOptimizer(Optimizer):
    lr: Positive = 1e-6
    """Peak learning rate of the actor."""
    eps: Positive = 1e-5
    """Added to the root of the second moment; 1e-5 as in the PPO papers' code (docs/ppo.md)."""


class PpoOptimizer(PolicyOptimizer):
    critic_lr: Positive = 5e-6
    """Peak learning rate of the critic (and of the value head when the trunk is shared)."""


class PolicySchedule(Schedule):
    length: Count = 100
    """How long to train, counted in `unit`."""
    unit: Literal["steps", "epochs"] = "steps"
    """steps: iterations, each one rollout and its updates; epochs: passes over the prompts."""
    decay: Literal["cosine", "linear", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    final: Fraction = 0.0
    """Learning rate at the end, as a part of the peak."""


class PromptData(Data):
    eval_limit: Count = 256
    """How many of the held-out prompts to use, from the start of the file."""
    max_length: Count = 512
    """Longest prompt, in tokens."""


class PolicyCheckpoint(Checkpoint):
    every: Annotated[int, Field(ge=0)] = 10
    """Iterations between training checkpoints; 0: only when a signal stops the run."""


class PolicyRoles(Section):
    actor: Place
    """The policy to improve: any model source, usually the SFT run."""
    reference: Place | None = None
    """The frozen policy of the KL penalty; none: the actor as it starts."""


class Roles(PolicyRoles):
    critic: Place | None = None
    """A reward model to start the critic from, head included; `zero`: the actor's trunk with a zero head; none: the reward
    model if it is one, else `zero`."""
    mode: Literal["separate", "shared", "adapters"] = "separate"
    """separate: actor and critic have a trunk each; shared: two heads on one trunk, the value head starts at zero; adapters:
    all roles are LoRA adapters on one frozen base, which is in memory once (docs/ppo.md)."""


class Rollout(Section):
    engine: Literal["native", "hf", "vllm"] = "native"
    """native: our decoder, on the module that is trained; hf: transformers' `generate` on it; vllm: a vLLM server, which gets
    the weights after each update (docs/rollouts.md)."""
    server: str = "http://127.0.0.1:8000"
    """vllm: address of the server."""
    overlap: bool = False
    """vllm: sample the next batch while this one's update runs, by the weights before it; needs an importance_cap."""
    record: bool = False
    """Keep the replies, log-probabilities and scores of every iteration in `rollouts/` of the run."""
    replay: Place | None = None
    """A run that recorded its rollouts: they are taken instead of sampling and scoring, to look into an update."""
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

    @field_validator("server")
    @classmethod
    def _is_plain_address(cls, server: str) -> str:
        if not re.fullmatch(r"https?://[^/?#@\s]+/?", server):
            raise ValueError("not the address of a server; it has the form http://host:port")
        return server

    @model_validator(mode="after")
    def _what_a_server_tells(self) -> Rollout:
        if self.engine == "vllm" and (self.top_k or self.top_p < 1):
            raise ValueError(
                "top_k must be 0 and top_p 1 with engine `vllm`: its log-probabilities would be of what they leave"
            )
        return self


class Kl(Section):
    coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the penalty on the KL divergence from the reference, in score units per nat; 0: the reference is never run."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator (Schulman, "Approximating KL divergence")."""
    place: Literal["tokens", "score", "loss"] = "tokens"
    """Where the penalty goes: into the reward of each token, as a sum over the reply into that of the last one, or into the
    loss (with k2, or k3 as in GRPO: the expected gradient of k1 is 0)."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: `coef` follows the measured KL (Ziegler et al. 2019, section 2.2)."""
    target: Positive = 6.0
    """Adaptive: KL per reply to aim at, in nats."""
    horizon: Count = 10000
    """Adaptive: replies over which the coefficient adapts."""
    refresh_every: Annotated[int, Field(ge=0)] = 0
    """Iterations after which the reference moves to the policy as it then is; 0: it stays where it was."""
    refresh_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the reference's weights that stays in a refresh (with `refresh_every: 1` a moving average of the policy)."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Kl:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("estimator must be k2 or k3 with place `loss`: the expected gradient of k1 is 0")
        if self.refresh_keep and not self.refresh_every:
            raise ValueError("refresh_keep has no meaning with refresh_every 0, which never moves the reference")
        if not self.coef and self.refresh_every:
            raise ValueError("refresh_every must be 0 with coef 0: there is no reference to move")
        return self


class Ptx(TextReading):
    file: Place | None = None
    """Rows of demonstrations or plain text whose loss is mixed into every optimizer step (PPO-ptx, Ouyang et al. 2022,
    arXiv:2203.02155, eq. 2); none: nothing is mixed in."""
    coef: Positive = 1.0
    """Weight of their loss, a mean over tokens, beside the policy's."""
    batch_size: Count = 8
    """Rows per optimizer step, over all processes."""

    @model_validator(mode="after")
    def _has_rows(self) -> Ptx:
        given = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.file is None and given:
            raise ValueError(f"{given[0]} has no meaning without file: there are no rows to mix in")
        return self


class PolicyUpdate(Section):
    epochs: Count = 4
    """Passes over each rollout batch."""
    minibatch_size: Count = 64
    """Replies per optimizer step, over all processes."""
    clip: Positive = 0.2
    """Policy ratio clipping range: a ratio counts between 1 - clip and 1 + clip."""
    clip_high: Positive | None = None
    """The range above 1, where that is to be another (clip-higher, DAPO: 0.28); none: as `clip`."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the ratio for tokens with a negative advantage (dual-clip PPO: 3); none: no bound."""
    ratio_of: Literal["tokens", "reply", "reply_mean"] = "tokens"
    """What has a ratio of its own, to be clipped: each token, or each reply, as the product (RLOO in TRL) or the geometric mean
    (GSPO) of those of its tokens."""
    aggregation: Literal["tokens", "replies", "constant"] = "tokens"
    """How the loss of a minibatch is a mean: over all its tokens; over the tokens of each reply, then over replies (GRPO); over
    replies of sums divided by `rollout.max_new_tokens` (Dr. GRPO)."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus, in nats a token; more than 0 takes memory for the logits several times."""
    importance_cap: Annotated[float, Field(ge=1)] | None = None
    """Weigh a token's policy loss by pi_old / pi_sampled, at most this, where the rollout engine computes otherwise than the
    update; none: off."""
    target_kl: Positive | None = None
    """Stop an iteration's updates when the mean 0.5 * (log ratio)^2 of a minibatch passes this, in nats; none: never."""


class PpoAlgorithm(PolicyUpdate):
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


class Grpo(PolicyUpdate):
    estimator: Literal["grpo", "rloo", "reinforce++", "reinforce++-baseline", "remax"] = "grpo"
    """What a reply's score is compared with, in place of a critic (docs/grpo.md)."""
    scale: Literal["group", "batch", "none"] = "group"
    """grpo: advantages are divided by the deviation of the scores of their prompt, of all replies, or not at all (Dr. GRPO)."""
    resample: Annotated[int, Field(ge=0)] = 0
    """Rounds of other prompts, at most, that take the places of prompts whose replies all score the same (dynamic sampling,
    DAPO). Those that remain have advantages of 0, and count in the mean of the loss."""
    epochs: Count = 1
    """Passes over each rollout batch."""
    aggregation: Literal["tokens", "replies", "constant"] = "replies"
    """How the loss of a minibatch is a mean: over the tokens of each reply, then over replies; over all its tokens (DAPO); over
    replies of sums divided by `rollout.max_new_tokens` (Dr. GRPO)."""


class Groups(Rollout):
    samples_per_prompt: Count = 8
    """Replies to each prompt."""


class Alarms(Section):
    action: Literal["note", "pause", "none"] = "note"
    """When a figure says that the policy goes wrong: log it with a reply and go on; also save and stop (exit 76), to go on with
    the same command; or say nothing. What was said is in alarms.jsonl (docs/explain.md)."""
    window: Count = 5
    """Iterations whose median counts: the first of the run, and the latest. What compares them waits until they are apart."""
    kl_budget: Positive | None = None
    """KL from the reference that is too much, in nats a reply; none: twice `kl.target` with the adaptive controller, else half
    a nat for each token of the mean reply."""
    entropy_left: Fraction = 0.1
    """Part of the entropy at the start below which the policy says one thing only."""
    ended_left: Fraction = 0.5
    """Part of the share of replies that ended at the start below which replies no longer end."""
    length_growth: Annotated[float, Field(gt=1)] = 1.5
    """Growth of the mean length, as a factor, that is too much where longer replies score higher."""
    repeated: Fraction = 0.2
    """Rise of the share of 4-grams that a reply has had before, above what it was at the start."""
    distinct_left: Fraction = 0.25
    """Part of the share of distinct 2-grams at the start below which all replies are alike."""
    gold: str | None = None
    """A metric of `eval.scorers` that should rise with the reward; none: nothing is compared with it."""
