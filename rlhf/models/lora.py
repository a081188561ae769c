"""LoRA through PEFT: adapters on a model, adapters from a directory, adapters merged away.

An adapter directory names its base and, in `base.json`, the base's digest: an adapter on other weights is noise, so opening
one checks it. An adapter can only be saved as such if its base lies on disk; on top of merged weights it cannot, and the
stage that would produce one is refused unless it merges too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config.sections import Lora
from rlhf.data.order import seed_of
from rlhf.digest import tree_digest
from rlhf.errors import DataError
from rlhf.models.heads import HEAD, add_bias, scalar_head
from rlhf.models.source import Source

# PEFT asks by the name that transformers 5.23 gave up; each run would say so
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)

BASE = "base.json"


def add_lora(model: PreTrainedModel, base: Source, lora: Lora, scalar: bool, seed: int) -> nn.Module:
    """Wraps a model with fresh factors (A drawn from the seed, B = 0, so it starts as its base)."""
    config = peft_config(lora, scalar, base.revision)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.enable_input_require_grads()
    with drawing(model, lora, scalar, seed):
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def peft_config(lora: Lora, scalar: bool, revision: str | None) -> LoraConfig:
    """Of fresh factors; a scalar head stays fully trained."""
    return LoraConfig(
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora.targets if lora.targets == "all-linear" else [name.strip() for name in lora.targets.split(",")],
        modules_to_save=[HEAD] if scalar else None,
        exclude_modules=[HEAD] if scalar else None,
        revision=revision,
    )


@contextmanager
def drawing(model: nn.Module, lora: Lora, scalar: bool, seed: int) -> Iterator[None]:
    """Fresh factors are drawn in here, from the seed alone; targets that are not in the model are the user's mistake."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "lora", scalar))
            yield
    except ValueError as error:
        raise DataError(f"lora.targets {lora.targets!r} does not fit {type(model).__name__}: {error}") from error


def merged_adapter(
    directory: Path, scalar: bool, open_base: Callable[[str], PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base of an adapter directory with the adapter merged in, and a loading report as transformers gives it.

    Raises:
        DataError: the adapter names no base, its base has changed, or it is a reward model's and a policy was asked for.
    """
    config, base = opened_config(directory, scalar)
    model = open_base(base)
    if scalar and scalar_head(model).bias is None and _has_bias(directory):
        add_bias(model)
    merged = PeftModel.from_pretrained(model, directory).merge_and_unload()  # pyright: ignore
    own_head = scalar and config.task_type == TaskType.SEQ_CLS
    return merged, {"missing_keys": {f"{HEAD}.weight"} if scalar and not own_head else set(), "unexpected_keys": set()}


def _has_bias(directory: Path) -> bool:
    """Of an adapter's scalar head: PEFT passes over a tensor that the model has no place for."""
    weights = directory / "adapter_model.safetensors"
    if not weights.exists():
        return False
    with safe_open(weights, "pt") as file:
        return any(name.endswith(f".{HEAD}.bias") for name in file.keys())  # noqa: SIM118 (it is no dict)


def opened_config(directory: Path, scalar: bool) -> tuple[PeftConfig, str]:
    """What an adapter directory says of its adapter, and its base: a model source, proven to be as it was.

    Raises:
        DataError: the adapter names no base, its base has changed, or it is a reward model's and a policy was asked for.
    """
    config = PeftConfig.from_pretrained(str(directory))
    base = config.base_model_name_or_path
    if base is None:
        raise DataError(f"{directory}/adapter_config.json: no base_model_name_or_path, so its base is unknown")
    if not scalar and config.task_type == TaskType.SEQ_CLS:
        raise DataError(f"{directory}: an adapter with a scalar head: this is a reward model, not a policy")
    _check_base(directory, base)
    return config, f"{base}@{config.revision}" if config.revision else base


def folded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model, any adapters added in, under the names it has without them; the model stays as it is."""
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    weights = {}
    for name, tensor in model.state_dict().items():
        module, found, leaf = name.partition(".base_layer.")
        if found and leaf == "weight":
            tensor = _folded(adapted[module], tensor)
        if ".lora_" not in name:
            weights[f"{module}.{leaf}" if found else name] = tensor
    return weights


def _folded(layer: Any, weight: Tensor) -> Tensor:
    """As PEFT merges: W + BA, in DoRA scaled to the trained magnitudes (Liu et al. 2024, arXiv:2402.09353, equation 5)."""
    delta = layer.get_delta_weight("default")
    if "default" not in layer.lora_magnitude_vector:
        return weight + delta
    magnitude = layer.lora_magnitude_vector["default"]
    out_first = (lambda matrix: matrix.T) if layer.fan_in_fan_out else (lambda matrix: matrix)
    norm = out_first(weight + delta).norm(dim=1)
    return out_first((magnitude.weight / norm)[:, None] * out_first(weight + delta))


def write_base(directory: Path, base: str) -> None:
    """Records which weights an adapter belongs to; a hub id needs no record (adapter_config.json has its revision)."""
    digest = tree_digest(Path(base)) if Path(base).is_dir() else None
    (directory / BASE).write_text(json.dumps({"path": base, "digest": digest}, indent=2) + "\n")


def _check_base(directory: Path, base: str) -> None:
    record = directory / BASE
    if not record.exists():
        return  # an adapter trained elsewhere
    digest = json.loads(record.read_text())["digest"]
    if digest is not None and (not Path(base).is_dir() or tree_digest(Path(base)) != digest):
        raise DataError(f"{directory}: the adapter's base {base} is gone or has changed since it was trained")
