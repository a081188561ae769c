"""The knobs of the commands that use a model without training it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config.decoding import BatchDecoding, Decoding
from rlhf.config.sections import Count, Fp8, OneFile, Place, Reading, Section, TextReading


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


class EvaluationData(TextReading, OneFile):
    pass


class EvalConfig(Inference):
    """How good a model is on held-out rows: loss and perplexity of a policy, accuracy of a reward model on pairs."""

    data: EvaluationData
    batch_size: Count = 16
    """Rows per forward pass; memory and speed only."""


COMMANDS: dict[str, type[Inference]] = {"chat": ChatConfig, "generate": GenerateConfig, "eval": EvalConfig}
