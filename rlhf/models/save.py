"""Writing a role as a plain Hugging Face directory: weights, config, tokenizer with its template, generation config.

The directory appears complete or not at all: written beside its place, synced, then renamed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.fp8.apply import undo
from rlhf.models.actor_critic import ActorCritic, unwrapped
from rlhf.models.heads import HEAD, bias_into_config
from rlhf.models.load import Loading, is_scalar, load_actor, load_generation_config, load_scalar, load_tokenizer
from rlhf.paths import beside, sync, sync_tree


def save_model(
    model: nn.Module,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None = None,
    merge: bool = False,
) -> None:
    """Saves an actor or a scalar model. With LoRA it is the adapter, unless `merge` folds it into the weights.

    FP8 layers end here: what is saved, and the model from now on, is plain.
    """
    partial = beside(directory)
    undo(model)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # save_pretrained imports an installed DeepSpeed, which warns on stdout
    adapter = hasattr(model, "peft_config")
    if adapter and merge:
        model, adapter = _merged(model), False
    inner: PreTrainedModel = unwrapped(model)  # pyright: ignore[reportAssignmentType]
    inner.config.pad_token_id = tokenizer.pad_token_id
    if not adapter:
        bias_into_config(inner)
    try:
        model.save_pretrained(partial)  # pyright: ignore[reportCallIssue]
        if adapter:
            _write_base(partial, model)
        if generation is not None:
            generation.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk it is in the way
        raise
    replaced = partial.with_suffix(".replaced")
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _merged(model: nn.Module) -> nn.Module:
    """The plain model: in place, or where the base must stay as it is (others stand on it, or it is quantised) from disk."""
    inner: PreTrainedModel = unwrapped(model)  # pyright: ignore[reportAssignmentType]
    if hasattr(model, "merge_and_unload") and not getattr(inner, "is_quantized", False):
        return model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    with TemporaryDirectory() as place:
        directory = Path(place) / "adapter"
        model.save_pretrained(directory)  # pyright: ignore[reportCallIssue]
        _write_base(directory, model)
        opened = load_scalar if is_scalar(str(directory)) else load_actor
        return opened(str(directory), Loading(dtype=inner.dtype))


def merged_copy(actor: nn.Module) -> nn.Module:
    """An actor with its adapters in its weights, as a plain model of no engine; the actor stays as it is."""
    inner: PreTrainedModel = unwrapped(actor)  # pyright: ignore[reportAssignmentType]
    if not hasattr(actor, "merge_and_unload") or getattr(inner, "is_quantized", False):
        return actor  # `_merged` goes by the disk then, and leaves it as it is
    # FSDP puts a class of its own, which no model is made of, before the model's.
    kind = next(each for each in type(inner).__mro__ if not each.__name__.startswith("FSDP"))
    with torch.device("meta"):
        plain = kind(inner.config)
    plain.load_state_dict(plain_weights(actor), assign=True)
    plain.tie_weights()
    return plain


def _write_base(directory: Path, model: nn.Module) -> None:
    from rlhf.models.lora import write_base  # peft costs five CPU seconds to import; only those who use it pay

    write_base(directory, str(unwrapped(model).config.name_or_path))  # pyright: ignore


def save_merged(spec: str, directory: Path) -> None:
    """An adapter directory and its base as one plain model, in float32."""
    reward = is_scalar(spec)
    opened = (load_scalar if reward else load_actor)(spec, Loading())
    generation = None if reward else load_generation_config(spec)
    save_model(opened, directory, load_tokenizer(spec), generation)


def critic_of(policy: ActorCritic) -> nn.Module:
    """The critic as a model of its own; from a shared trunk it is assembled around the value head."""
    critic = policy.part("critic")
    if critic is not None:
        return critic
    assert policy.actor is not None
    assert policy.value_head is not None
    actor: PreTrainedModel = unwrapped(policy.actor)  # pyright: ignore[reportAssignmentType]
    config = type(actor.config).from_dict({**actor.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        scalar = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    prefix = f"{actor.base_model_prefix}."
    weights = {name: tensor for name, tensor in plain_weights(policy.actor).items() if name.startswith(prefix)}
    weights |= {f"{HEAD}.{name}": tensor for name, tensor in policy.value_head.state_dict().items()}
    scalar.load_state_dict(weights, assign=True)
    return scalar


def plain_weights(actor: nn.Module) -> dict[str, torch.Tensor]:
    """By the names of the Hugging Face model, a LoRA adapter merged; the actor stays as it is."""
    if not hasattr(actor, "peft_config"):
        return actor.state_dict()
    from rlhf.models.lora import folded_weights  # imports peft

    return folded_weights(unwrapped(actor))
