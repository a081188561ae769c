"""Sections of the config that several stages have: each field with its unit, its range and its default."""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def _place(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path may")
    return expanduser(text)


Place = Annotated[str, AfterValidator(_place)]


class Section(BaseModel):
    # defer_build: a section is validated as part of its stage only; one of its own would be built at every start, for nothing
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True)


class Model(Section):
    path: Place
    """Weights to start from: a Hugging Face id (`id@revision`), a Hugging Face, GGUF or run directory or file."""
    from_scratch: bool = False
    """Draw random weights for the architecture in `path` instead of loading any (needs only its config and tokenizer)."""


class Lora(Section):
    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the LoRA factors (Hu et al. 2021); 0 trains all weights."""
    alpha: Positive = 16.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the factors, a probability. PPO needs 0: its ratio must start at exactly 1."""
    targets: str = "all-linear"
    """Which linear layers get factors: `all-linear`, or layer name endings separated by commas (`q_proj,v_proj`)."""
    dora: bool = False
    """Train a magnitude for each output beside the factors (DoRA, Liu et al. 2024): a closer fit, slower steps."""
    base: Literal["plain", "nf4"] = "plain"
    """nf4: the frozen base, and PPO's reference, are held in 4 bits (QLoRA, Dettmers et al. 2023); needs bitsandbytes."""
    merge: bool = False
    """Write the merged model as the stage's result instead of the adapter."""


OPTIONS_OF_RECIPES = {
    "amax_history": ("delayed",),
    "amax_algorithm": ("delayed",),
    "margin": ("delayed", "current"),
    "block_scales": ("block",),
}
"""Options that only some FP8 recipes have."""


class Fp8(Section):
    recipe: Literal["none", "delayed", "current", "block", "rowwise", "mxfp8"] = "none"
    """How the linear layers are scaled into FP8 (docs/fp8.md); none: no FP8. PPO wants one whose tokens do not depend on
    their batch: block, rowwise, mxfp8 or delayed."""
    backend: Literal["auto", "te", "torchao", "reference"] = "auto"
    """te: Transformer Engine; reference: emulated, on any device; auto: the first of them that can do the recipe here,
    without a GPU the reference."""
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """hybrid: E4M3 forward, E5M2 for gradients; auto: hybrid for delayed and current, E4M3 throughout for the others."""
    amax_history: Count = 1024
    """delayed: steps whose largest magnitudes are remembered."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """delayed: which of them the scale follows."""
    margin: Annotated[int, Field(ge=0)] = 0
    """delayed, current: powers of two kept free above the largest magnitude."""
    block_scales: Literal["power_of_two", "fp32"] = "power_of_two"
    """block: the kind of scale; Blackwell has powers of two only."""
    high_precision: tuple[Literal["fprop", "dgrad", "wgrad"], ...] = ()
    """Matrix products left out of FP8 in every layer."""
    keep: tuple[str, ...] = ()
    """Layers left out: names with * (`*.down_proj`), or one product of them (`*.down_proj:wgrad`)."""
    keep_first: Annotated[int, Field(ge=0)] = 0
    """Transformer layers left out at the bottom."""
    keep_last: Annotated[int, Field(ge=0)] = 0
    """Transformer layers left out at the top."""

    @model_validator(mode="after")
    def _has_meaning(self) -> Fp8:
        """What a recipe does not have is no option of it: passed over in silence, a run would not be what its config says.

        With none all is idle, so that one flag turns FP8 off and leaves the rest for when it comes back.
        """
        for name, recipes in OPTIONS_OF_RECIPES.items():
            if self.recipe not in ("none", *recipes) and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with recipe {self.recipe}, only with {', '.join(recipes)}")
        return self


class Fp8Probe(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Steps (PPO: iterations) between probes, which run a span without FP8 first, and then with it; 0: never."""
    steps: Count = 100
    """Length of the span, in steps; at most `every`."""
    fallback: bool = False
    """Where the gap is too large, go on from the span without FP8."""

    @model_validator(mode="after")
    def _fits(self) -> Fp8Probe:
        if 0 < self.every < self.steps:
            raise ValueError(f"steps {self.steps} must be at most every {self.every}: one span ends before the next begins")
        return self


class TrainingFp8(Fp8):
    probe: Fp8Probe = Fp8Probe()


class Optimizer(Section):
    lr: Positive = 1e-5
    """Peak learning rate of AdamW."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean, per optimizer step."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean, per optimizer step."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, per step and unit of learning rate."""
    max_grad_norm: Positive = 1.0
    """Joint gradient norm over all trained weights and ranks above which gradients are scaled down."""


class Schedule(Section):
    length: Count = 1
    """How long to train, counted in `unit`."""
    unit: Literal["steps", "epochs", "tokens"] = "epochs"
    """steps: optimizer steps (PPO: iterations); epochs: passes over the training rows; tokens: tokens a loss is taken on."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Part of the run over which the rate rises from 0 to its peak."""
    final: Fraction = 0.1
    """Learning rate at the end, as a part of the peak."""


class RowReading(Section):
    columns: dict[str, str] = {}
    """Our column name -> the file's (`prompt: question`)."""
    extra_columns: Literal["fail", "ignore"] = "fail"
    """What to do with columns nobody asked for."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a malformed row: stop with its file:line, or leave it out and count it."""
    max_skip_fraction: Fraction = 0.01
    """With `on_error: skip`, the part of rows that may be left out before it is an error all the same."""
    max_line_bytes: Count = 8 * 2**20
    """A line of .jsonl longer than this, in bytes, is a malformed row."""


class Reading(RowReading):
    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: the tokenizer's chat template; plain: prompt and reply are joined as they are; auto: chat where there is one."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest prompt + reply, in tokens."""
    too_long: Literal["fail", "skip", "truncate"] = "fail"
    """A row past `max_length`: stop, leave it out and count it, or cut it (PPO: prompts at their start; else at the end)."""


class TextReading(Reading):
    json_key: str | None = None
    """Column of plain text to train on (`text`); only for rows that are neither chats nor prompt/response."""
    too_long: Literal["fail", "skip", "truncate", "split"] = "fail"
    """A row past `max_length`: stop, leave it out and count it, cut it at the end, or (plain text; there the default) make
    several rows of it, so that every token is trained on."""
    loss_on: Literal["responses", "all"] = "responses"
    """Tokens that carry the loss: the replies only, or every token."""

    @model_validator(mode="before")
    @classmethod
    def _documents_are_split(cls, values: Any) -> Any:
        return {"too_long": "split", **values} if isinstance(values, dict) and values.get("json_key") else values

    @model_validator(mode="after")
    def _only_documents_are_split(self) -> TextReading:
        if self.too_long == "split" and self.json_key is None:
            raise ValueError(
                "too_long may be `split` for plain text only, as a chat or reply would be parted from its prompt: "
                "name the column of text in data.json_key, or choose skip or truncate"
            )
        return self


class TrainingFiles(Section):
    train: Place
    """Training rows: a .jsonl, .jsonl.gz, .json or .parquet file."""
    eval: Place | None = None
    """Held-out rows in the same form; none: no evaluation."""


class OneFile(Section):
    file: Place
    """Rows: a .jsonl, .jsonl.gz, .json or .parquet file."""


class Data(Reading, TrainingFiles):  # the fields of the last come first
    pass


class FrozenCache(Section):
    limit_mib: Annotated[int, Field(ge=0)] = 1024
    """With frozen_layers: memory of each process, in MiB, for what the frozen layers made of an iteration's rows, which is then
    computed once for all roles and epochs; what does not fit, and rows that another process had before, are computed again.
    0: nothing is kept."""
    dtype: Literal["same", "bf16"] = "same"
    """bf16: half the memory; the layers above then get activations rounded to it, from the first time on."""
    place: Literal["device", "host"] = "device"
    """host: in the host's memory, copied to the device for each use."""


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)] = 100
    """Steps (PPO: iterations) between training checkpoints; 0: only when a signal stops the run."""
    keep: Count = 2
    """How many of the newest to keep."""


class NonFinite(Section):
    action: Literal["abort", "skip"] = "abort"
    """A loss, gradient norm, score, KL, advantage or return that is NaN or infinite never reaches the optimizer. abort: it ends
    the run (exit 1); skip: the step is left out (of PPO, where it is no loss or norm, the iteration's update) and the run goes
    on. RUN/non_finite/ has the rows."""
    max_consecutive: Count = 3
    """skip: how many steps in a row may be left out before it is an error after all."""


class Report(Section):
    samples: Annotated[int, Field(ge=0)] = 4
    """Prompts whose replies are written to samples.jsonl and the console at each evaluation."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where metrics go besides metrics.jsonl, which is the record: each is a package of its own."""
    profile: bool = False
    """Profile the third step after a start: a trace, and its time by phase and kind of operator, in profile/ of the run."""
