"""The knobs of the commands that use a model without training it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.decoding import BatchDecoding, Decoding
from rlhf.config.rewards import Scoring
from rlhf.config.sections import Count, Fp8, OneFile, Place, Positive, Reading, RowReading, Section, TextReading


class UsedFp8(Fp8):
    recipe: Literal["delayed", "current", "block", "rowwise", "mxfp8"] = "block"
    """How the linear layers are scaled into FP8 (docs/fp8.md); for a model trained in FP8 the recipe of its training."""


class Inference(Section):
    """What every command has that runs a model."""

    model: Place
    """A run, a Hugging Face id (`id@revision`) or directory, a Megatron checkpoint or a .gguf file."""
    precision: Literal["fp32", "bf16", "fp8", "both"] = "fp32"
    """bf16: autocast over fp32 weights; fp8: linear layers by `fp8.recipe`; both: the same weights with and without FP8."""
    plain: Literal["fp32", "bf16"] = "fp32"
    """fp8, both: the precision of all that is not FP8."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model. A Hub model must then be pinned to a commit (`id@40 hex digits`)."""
    fp8: UsedFp8 = UsedFp8()

    @model_validator(mode="after")
    def _fp8_where_it_is_used(self) -> Inference:
        if self.precision not in ("fp8", "both") and "fp8" in self.model_fields_set:
            raise ValueError(f"fp8 is set and precision is {self.precision}: give precision `fp8` or `both`")
        return self

    @model_validator(mode="after")
    def _plain_beside_fp8(self) -> Inference:
        if self.plain == "bf16" and self.precision == "fp32":
            raise ValueError("plain `bf16` is for precision `fp8` and `both`; without FP8, give precision `bf16`")
        return self


class PromptFile(Reading, OneFile):
    file: Place
    """Rows: a .jsonl, .jsonl.gz, .json or .parquet file, or a .txt file with a prompt on each line."""
    extra_columns: Literal["fail", "ignore"] = "ignore"
    """ignore: columns nobody asked for go along to the replies; fail: they are an error."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest prompt, in tokens."""


class GenerateConfig(BatchDecoding, Inference):
    """Replies of a policy to the prompts of a file, a row for each."""

    data: PromptFile
    output: Place
    """The .jsonl file to write: the rows' prompts and other columns, and `response` and `finished` (it ended by itself). With
    several samples a prompt also `sample`, their number. With precision `both`, one of each for either: `response_fp32`,
    `response_fp8`, ..."""


class ChatConfig(Decoding, Inference):
    """Talk to a policy: a line is a message. /reset begins anew, /system TEXT says who it is, /quit ends."""

    system: str | None = None
    """The system message that a conversation begins with."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: each line is continued as text; auto: chat where there is a template."""

    @model_validator(mode="after")
    def _one_precision(self) -> ChatConfig:
        if self.precision == "both":
            raise ValueError("precision must be one of fp32, bf16 and fp8: a conversation goes one way")
        return self


class EvaluationData(TextReading):
    file: Place | None = None
    """Held-out rows: a .jsonl, .jsonl.gz, .json or .parquet file; of chats, prompts with completions, or text for a policy, of
    pairs or ranked replies for a reward model, and for a policy with a `reference`."""


class MaybeScoring(Scoring):
    """As `Scoring`, or nothing of it."""

    needed: ClassVar[bool] = False


class Judge(Section):
    command: str | None = None
    """Who decides which of two replies is better: a command, without a shell, that reads lines of JSON {"prompt", "a", "b"} and
    answers a, b or tie, a line each. It is asked about every pair twice, in both orders (docs/evaluation.md)."""
    timeout_s: Positive = 600.0
    """Seconds until it must have answered all."""

    @model_validator(mode="after")
    def _has_a_command(self) -> Judge:
        if self.command is None and self.model_fields_set - {"command"}:
            raise ValueError("timeout_s has no meaning without a command: give judge.command")
        return self


class EvalConfig(Inference):
    """How good a model is. On held-out rows (--data): loss and perplexity of a policy, accuracy of a reward model or of
    implicit rewards. On prompts (--prompts): scores, length and KL of a policy's replies, and how often they beat another's."""

    data: EvaluationData = EvaluationData()
    prompts: Place | None = None
    """In place of `data`: prompts that the policy replies to; read as data.* says."""
    slice: tuple[str, ...] = ()
    """Pairs: columns of the rows whose values accuracy is also told by (`source,category`)."""
    reference: Place | None = None
    """Pairs: the policy that implicit rewards, beta * log-ratio, are measured from (DPO, KTO). Prompts: the policy that the KL
    is measured from."""
    beta: Positive = 0.1
    """Pairs, with `reference`: the loss.beta that the policy was trained with. Accuracy does not depend on it."""
    base: Place | None = None
    """Rows: the model that this one was made from, on the same rows: what was lost, with its interval."""
    max_forgetting: Annotated[float, Field(ge=0)] | None = None
    """With `base`: how much may be lost, in nats per token of a policy, in accuracy (0 to 1) of a reward model. Where the 95%
    interval is wholly above that, the command ends with exit code 1."""
    reward: MaybeScoring = MaybeScoring()
    judge: Judge = Judge()
    against: Place | None = None
    """Prompts: another policy, whose replies are compared with those of this one, by the reward, the judge, or both."""
    max_new_tokens: Count = 128
    """Prompts: longest reply, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Prompts: logits are divided by it; 0: greedy."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Prompts: what is sampled follows from it and the row's place among the usable rows, whatever the batch size."""
    batch_size: Count = 16
    """Rows per forward pass; memory and speed only."""
    output: Place | None = None
    """A .json file to write the result to, of prompts with every reply."""

    @model_validator(mode="after")
    def _has_meaning(self) -> EvalConfig:
        """What the rest does not need is no option of it: passed over in silence, it would be taken for heard."""
        if (self.data.file is None) == (self.prompts is None):
            what = "both are given" if self.prompts else "neither is given"
            raise ValueError(f"data is for held-out rows, prompts for replies to them, and {what}: give --data or --prompts")
        there = {name for name in type(self).model_fields if name in self.model_fields_set and getattr(self, name) is not None}
        there = there - {"data"} | ({"data"} if self.data.file else set())
        for name, needed, why in NEEDS:
            if name in there and not there & set(needed):
                raise ValueError(f"{name} {why}: give {' or '.join(needed)}, or leave it out")
        if self.base and self.reference:
            raise ValueError("base and reference are both given: of implicit rewards there is no base; keep one")
        if self.temperature == 0 and self.prompts and self.reference:
            raise ValueError("reference: the KL is a mean over sampled replies, and temperature 0 draws none; give another")
        if self.precision == "both" and (alone := {"prompts", "base", "reference"} & there):
            with_it = " and ".join(sorted(alone))
            raise ValueError(f"precision `both` is for one model on held-out rows, without {with_it}: give one precision")
        return self


NEEDS = (
    ("slice", ("data",), "is of held-out pairs"),
    ("base", ("data",), "is compared on held-out rows; on prompts a policy is compared with against"),
    ("max_forgetting", ("base",), "limits what was lost from a base"),
    ("beta", ("reference",), "is a factor of implicit rewards"),
    ("beta", ("data",), "is a factor of implicit rewards, which are of pairs"),
    ("reward", ("prompts",), "scores replies to prompts; for rows with replies there is `rlhf score`"),
    ("judge", ("against",), "compares replies of two policies"),
    ("against", ("prompts",), "is compared by replies to prompts"),
    ("against", ("reward", "judge"), "needs somebody to say which reply is better"),
    ("max_new_tokens", ("prompts",), "is of replies to prompts"),
    ("temperature", ("prompts",), "is of replies to prompts"),
    ("seed", ("prompts",), "is of replies to prompts"),
)
"""(option, those of which it needs one, why) of `rlhf eval`."""


class ScoredRows(RowReading, OneFile):
    extra_columns: Literal["fail", "ignore"] = "ignore"
    """ignore: columns nobody asked for are kept beside the scores; fail: they are an error."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a reward model reads prompt and reply: by its chat template, joined as they are, or auto: chat where there is one."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt + reply, in tokens of a reward model; none: as long as the model has positions for."""
    too_long: Literal["fail", "skip"] = "fail"
    """A reply past `max_length`, or the model's positions: stop before any is scored, or give it no score and count it."""


class ScoreConfig(Section):
    """Scores of replies that are there already: rows with a reply, or with a chosen and a rejected one."""

    reward: Scoring
    data: ScoredRows
    output: Place
    """The .jsonl file to write: the rows as they came, and `score`; of pairs `score_chosen` and `score_rejected`."""
    batch_size: Count = 16
    """Replies per forward pass of a reward model; memory and speed only."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model. A Hub model must then be pinned to a commit (`id@40 hex digits`)."""

    @model_validator(mode="after")
    def _has_tokens_to_count(self) -> ScoreConfig:
        for name in ("max_length", "too_long"):
            if getattr(self.data, name) != ScoredRows.model_fields[name].default and not self.reward.models:
                raise ValueError(f"data.{name} has no meaning without a reward model, whose tokens it counts: leave it out")
        return self


class RecordConfig(Inference):
    """What each module of a model gives on fixed tokens, in a file that `rlhf compare` compares with another."""

    record: Place
    """The .safetensors file to write."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """bf16: autocast over fp32 weights; fp8: linear layers by `fp8.recipe`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    data: Place | None = None
    """Chats, prompts with completions or text; none: tokens drawn from a fixed seed."""
    rows: Count = 2
    """How many rows: the first of the data."""
    tokens: Annotated[int, Field(ge=2)] = 32
    """Longest row, in tokens; the rest of a longer one is left out."""


COMMANDS: dict[str, type[Section]] = {
    "chat": ChatConfig,
    "compare": RecordConfig,
    "generate": GenerateConfig,
    "eval": EvalConfig,
    "score": ScoreConfig,
}
POSITIONALS = {
    "chat": ("model",),
    "compare": ("model",),
    "generate": ("model",),
    "eval": ("model",),
    "score": ("reward", "data"),
}
"""Flags that may be given by their place, in front of all others."""
