"""Opening models: any source to a Hugging Face module, with every tensor accounted for.

An actor is a `...ForCausalLM`, a reward model or critic a `...ForSequenceClassification` with one label. Dropout is off in all
of them, in every stage: PPO's ratio needs it, and one rule is easier to reason about than three.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlhf.checkpoints.pickles import UnpicklingError, forbidden
from rlhf.errors import ConfigError, DataError
from rlhf.models.heads import HEAD, bias_from_config, initialise_head
from rlhf.models.remote_code import check_remote_code, refused
from rlhf.models.source import Source, resolve
from rlhf.models.trunk import attend_by_segments, checkpoint_activations

transformers_logging.set_verbosity_error()  # its load report is replaced by our own, stricter one
transformers_logging.disable_progress_bar()

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "*.tiktoken")


@dataclass(frozen=True)
class Loading:
    """How weights are held, the same for every role of a run."""

    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    seed: int = 0
    nf4: bool = False
    """Linear layers of a plain model in 4 bits, to be the frozen base of adapters."""
    trust_remote_code: bool = False
    """Whether Python files that lie beside the weights may be run (rlhf/models/remote_code.py)."""


def load_tokenizer(spec: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; one that cannot pad gets its EOS as pad (masks never look at ids)."""
    source = local(resolve(spec))
    check_remote_code(source, trust_remote_code)
    if source.kind == "directory" and not any(any(Path(source.path).glob(pattern)) for pattern in TOKENIZER_FILES):
        # transformers 5 makes an empty one from config.json, which knows no word
        raise DataError(f"{spec}: no tokenizer beside the model; copy its tokenizer.json and tokenizer_config.json there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise refused(source, error) or DataError(
            f"{spec}: no tokenizer could be opened beside the model: {_first_line(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{spec}: the tokenizer has no EOS token; replies could never end. Set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(model_generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a reply: the tokenizer's EOS first, then those the generation config adds."""
    more = model_generation.eos_token_id
    more = [] if more is None else [more] if isinstance(more, int) else list(more)
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *more]))  # pyright: ignore[reportArgumentType]


def load_generation_config(spec: str) -> GenerationConfig:
    source = local(resolve(spec))
    if source.kind == "directory" and not (Path(source.path) / "generation_config.json").exists():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(source.path, revision=source.revision or "main")


def load_actor(spec: str, loading: Loading, from_scratch: bool = False) -> PreTrainedModel:
    """A causal language model. `from_scratch` draws its weights from `loading.seed` instead of reading them."""
    source = local(resolve(spec))
    if from_scratch:
        return finish(_from_config(source, loading), loading)
    model, report = _from_pretrained(AutoModelForCausalLM, source, loading)
    if any(key.startswith(f"{HEAD}.") for key in report["unexpected_keys"]):
        raise DataError(f"{spec}: holds a scalar head (`{HEAD}.weight`): this is a reward model, not a policy")
    _account(spec, report, missing=set(), unexpected=set())
    return finish(model, loading)


def load_scalar(spec: str, loading: Loading, role: str = "model", new_head: bool = False) -> PreTrainedModel:
    """A trunk with a scalar head. With `new_head` the source is a language model and the head is drawn (heads.py);
    without it a missing head is an error, never a random one."""
    source = local(resolve(spec, role))  # pyright: ignore[reportArgumentType]
    model, report = _from_pretrained(AutoModelForSequenceClassification, source, loading, num_labels=1)
    head_missing = {key for key in report["missing_keys"] if key.startswith(f"{HEAD}.")}
    if head_missing and not new_head:
        raise DataError(
            f"{spec}: the scalar head is missing ({', '.join(sorted(head_missing))}): this is not a reward model. "
            "Train one with `rlhf rm`, or name one whose checkpoint holds that tensor"
        )
    _account(spec, report, missing=head_missing, unexpected={"lm_head.weight", "lm_head.bias"} if head_missing else set())
    if head_missing:
        initialise_head(model, loading.seed)
    else:
        bias_from_config(model)
    return finish(model, loading)


def is_scalar(spec: str, trust_remote_code: bool = False) -> bool:
    """Whether a model is a reward model or critic, by what its config or its adapter says of itself."""
    source = local(resolve(spec))
    adapter = Path(source.path) / "adapter_config.json"
    if adapter.exists():
        return json.loads(adapter.read_text()).get("task_type") == "SEQ_CLS"
    config = _config(source, trust_remote_code)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def configured_positions(spec: str, trust_remote_code: bool = False) -> int | None:
    """Tokens that a model's longest row may have, by its config alone; None: as many as one likes, or an adapter."""
    source = local(resolve(spec))
    if (Path(source.path) / "adapter_config.json").exists():
        return None
    return getattr(_config(source, trust_remote_code).get_text_config(), "max_position_embeddings", None)


def local(source: Source) -> Source:
    """Sources transformers does not read as they are, converted once."""
    match source.kind:
        case "gguf":
            from rlhf.models.gguf import converted
        case "megatron":
            from rlhf.models.megatron import converted  # all layouts and families: a tenth of a second for those who have none
        case _:
            return source
    return Source("directory", str(converted(Path(source.path))), None, source.run)


def _config(source: Source, trust_remote_code: bool, **changes: Any) -> Any:
    check_remote_code(source, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code, **changes)
    except (OSError, ValueError) as error:
        raise refused(source, error) or DataError(
            f"{source.path}: transformers cannot open it: {_first_line(error)}"
        ) from error


def _from_config(source: Source, loading: Loading) -> PreTrainedModel:
    config = _config(source, loading.trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(loading.seed)
        model = AutoModelForCausalLM.from_config(
            without_dropout(config),
            dtype=torch.float32,
            attn_implementation=loading.attention,
            trust_remote_code=loading.trust_remote_code,
        )
    return model.to(loading.dtype)


def _from_pretrained(factory: Any, source: Source, loading: Loading, **changes: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    adapter = Path(source.path) / "adapter_config.json"
    if adapter.exists():
        from rlhf.models.lora import merged_adapter  # peft costs five CPU seconds to import; only those who use it pay

        scalar = "num_labels" in changes
        open_base = partial(load_scalar, new_head=True) if scalar else load_actor
        try:
            return merged_adapter(adapter.parent, scalar, lambda base: open_base(base, replace(loading, nf4=False)))
        except SafetensorError as error:
            raise DataError(_corrupt(adapter.parent, error)) from error
        except UnpicklingError as error:
            raise DataError(f"{source.path}: refused, nothing of it was run: {forbidden(str(error))}") from None
    config = _config(source, loading.trust_remote_code, **changes)
    try:
        return factory.from_pretrained(
            source.path,
            revision=source.revision,
            config=without_dropout(config),
            dtype=loading.dtype,
            attn_implementation=loading.attention,
            output_loading_info=True,
            trust_remote_code=loading.trust_remote_code,
            **({"quantization_config": _four_bits(loading)} if loading.nf4 else {}),
        )
    except SafetensorError as error:
        raise DataError(_corrupt(Path(source.path), error)) from error
    except UnpicklingError as error:
        raise DataError(f"{source.path}: refused, nothing of it was run: {forbidden(str(error))}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(source, error) or DataError(
            f"{source.path}: transformers cannot open it: {_first_line(error)}"
        ) from error


def _four_bits(loading: Loading) -> BitsAndBytesConfig:
    """As in QLoRA (Dettmers et al. 2023): NF4, and the scales themselves quantised."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.base: `nf4` needs the package bitsandbytes: pip install 'rlhf[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=loading.dtype,
    )


def _corrupt(directory: Path, error: SafetensorError) -> str:
    """Which file of a directory is no safetensors file: the library's own message names none."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return f"{file}: corrupt, or cut short: {_first_line(error)}; fetch or copy it again"
    return f"{directory}: its weights cannot be read: {_first_line(error)}"


def _account(spec: str, report: dict[str, Any], missing: set[str], unexpected: set[str]) -> None:
    """Every tensor read is used and every tensor needed was read, but for those named."""
    lacking = sorted(set(report["missing_keys"]) - missing)
    surplus = sorted(set(report["unexpected_keys"]) - unexpected)
    wrong = sorted(str(key) for key in report.get("mismatched_keys", ()))
    for what, keys in (
        ("lacks", lacking),
        ("holds, but the architecture has no place for,", surplus),
        ("has the wrong shape for", wrong),
    ):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise DataError(f"{spec}: the checkpoint {what} {', '.join(keys[:5])}{more}")


def without_dropout(config: Any) -> Any:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(part, name, 0.0)
    return config


def finish(model: PreTrainedModel, loading: Loading) -> PreTrainedModel:
    """As every stage computes with it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # the row of pad gets no gradient, and where pad is EOS it is the row of EOS
    if loading.attention == "sdpa":
        attend_by_segments(model)
    if loading.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
