"""Whether a model is of a family: what its args say, which tensors it has, what its config.json says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rlhf.checkpoints import names
from rlhf.checkpoints.families import of_config
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.stored import Checkpoint, Stored
from rlhf.checkpoints.templates import fill
from rlhf.errors import DataError

ROUTED = (names.ROUTER, names.EXPERT_FC1, names.EXPERT_FC2, names.SHARED_FC1, names.SHARED_FC2, names.SHARED_GATE)
MLP = (names.FC1, names.FC2, *ROUTED)
LINEAR = (names.PROJ, names.FC1, names.FC2)
BIAS_ARGS = ("add_bias_linear", "add_qkv_bias")


def contradiction(source: Checkpoint, family: Family, config: Mapping[str, Any]) -> str | None:
    """What speaks against the source being of this family, in words; None where nothing does."""
    return (
        _said_otherwise(source.args, family, config)
        or _gated_otherwise(source.tensors, family)
        or _other_layers_routed(source.tensors, family, config)
        or _lacking(source.tensors, family, config)
        or _other_biases(source.tensors, family, config)
    )


def agree_with_args(source: Checkpoint, place: str) -> None:
    """Tensors and args are of one model, whichever its family.

    Raises:
        DataError: args speak of biases or a head that is not there, or know nothing of biases that are.
    """
    if found := _biases_said_otherwise(source) or _headless(source) or _routed_otherwise(source):
        raise DataError(f"{place}: {found}; files of two models, or incomplete?")


def agree(source: Checkpoint, family: Family, config: Mapping[str, Any], place: str) -> None:
    """A model is of the family it is taken for.

    Raises:
        DataError: it is not; the message says in what.
    """
    if found := contradiction(source, family, config):
        raise DataError(f"{place}: taken for a {family.name} model, but {found}")


def agree_with_config(family: Family, config: Mapping[str, Any], place: str) -> None:
    """A family that was named is the one config.json belongs to, where any claims that.

    Raises:
        DataError: it is another.
    """
    claimed = of_config(config)
    if claimed not in (None, family):
        raise DataError(f"--family {family.name}: {place}'s model_type {config['model_type']!r} is of {claimed.name}")


def args_of(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron's args say of such a model; ALiBi is Falcon's choice in config.json."""
    return {**family.args, **({"position_embedding_type": "alibi"} if config.get("alibi") else {})}


def _said_otherwise(args: Mapping[str, Any], family: Family, config: Mapping[str, Any]) -> str | None:
    said = dict(args)
    if args.get("use_rotary_position_embeddings"):  # before 2023-10 the type stayed at its default beside this
        said["position_embedding_type"] = "rope"
    for name, value in args_of(family, config).items():
        if name not in BIAS_ARGS and said.get(name) not in (None, value):
            return f"its args say {name} {said[name]!r}, and one has {value!r}"
    return None


def _biases_said_otherwise(source: Checkpoint) -> str | None:
    """Args against tensors. add_bias_linear alone gives query, key and value theirs, too."""
    there = biases(source.tensors)
    linear, qkv = (source.args.get(name) for name in BIAS_ARGS)
    if linear is not None and bool(linear) != there["add_bias_linear"]:
        return f"its args say add_bias_linear {linear}, its tensors have {'such' if not linear else 'no such'} biases"
    if qkv and not there["add_qkv_bias"]:
        return "its args say add_qkv_bias True, its tensors have no such biases"
    if qkv is False and not linear and there["add_qkv_bias"]:
        return "its args say add_qkv_bias False, its tensors have such biases"
    return None


def biases(tensors: Collection[str]) -> dict[str, bool]:
    """Which matrices have biases, as Megatron's args say it: Llama's may or may not."""
    first = {"layer": "0", "expert": "0", "leaf": "bias"}
    linear = any(fill(template, first) in tensors for template in (names.PROJ, names.FC1, names.EXPERT_FC1))
    return {"add_bias_linear": linear, "add_qkv_bias": fill(names.QKV, first) in tensors}


def _headless(source: Checkpoint) -> str | None:
    untied = source.args.get("untie_embeddings_and_output_weights") and not source.copies
    return (
        f"its args say its head is not tied, and {names.HEAD} is missing"
        if untied and names.HEAD not in source.tensors
        else None
    )


def routed(tensors: Collection[str]) -> list[int]:
    """For each layer 1 where a router picks experts, 0 where its MLP is dense."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("decoder.layers.")}
    return [int(fill(names.ROUTER, {"layer": layer}) in tensors) for layer in sorted(layers, key=int)]


def moe_layer_freq(tensors: Collection[str]) -> int | list[int]:
    """The same as Megatron's argument: 1 where all are alike."""
    layers = routed(tensors)
    return layers if 0 < sum(layers) < len(layers) else 1


def _routed_otherwise(source: Checkpoint) -> str | None:
    """Source: megatron-core 0.16.1, gpt_layer_specs.py: a list with one entry a layer, or every so many layers."""
    told, layers = source.args.get("moe_layer_freq"), routed(source.tensors)
    if not source.args.get("num_experts") or not isinstance(told, int | list | tuple):
        return None
    expected = [int(layer % told == 0) for layer in range(len(layers))] if isinstance(told, int) else [*told]
    return None if expected == layers else f"its args say moe_layer_freq {told}, its tensors have experts in layers {layers}"


def _other_layers_routed(tensors: Collection[str], family: Family, config: Mapping[str, Any]) -> str | None:
    """config.json of Qwen's routed models names the layers that are not, or says every how many are."""
    if names.ROUTER not in family.tensors or names.FC1 not in family.tensors or not config:
        return None
    layers, step, dense = routed(tensors), config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    expected = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(len(layers))]
    return None if expected == layers else f"config.json has experts in layers {expected}, its tensors in {layers}"


def _gated_otherwise(tensors: Mapping[str, Stored], family: Family) -> str | None:
    first = {"layer": "0", "leaf": "weight"}
    fc1, fc2 = (tensors.get(fill(template, first)) for template in (names.FC1, names.FC2))
    if fc1 is None or fc2 is None or names.is_gated(names.FC1, fc1.shape, fc2.shape) == family.args["swiglu"]:
        return None
    return f"its MLP is {'not ' if family.args['swiglu'] else ''}gated"


def _lacking(tensors: Collection[str], family: Family, config: Mapping[str, Any]) -> str | None:
    missing = next((name for name in _needed(tensors, family) if name not in tensors), None)
    return f"{missing} is missing" if missing else None


def _needed(tensors: Collection[str], family: Family) -> Iterator[str]:
    """What a model of the family has in any case: every weight of its table, and the biases of a LayerNorm."""
    layers = routed(tensors)
    if names.ROUTER in family.tensors and not any(layers):
        yield fill(names.ROUTER, {"layer": "0"})
    leaves = ("weight", "bias") if family.args.get("normalization") == "LayerNorm" else ("weight",)
    for template in family.tensors:
        if template == names.HEAD:  # tied or not: `tied` of config.json and args
            continue
        for leaf in leaves if "norm" in template and "{leaf}" in template else ("weight",):
            if "{layer}" not in template:
                yield fill(template, {"leaf": leaf})
                continue
            for layer, is_routed in enumerate(layers):
                if template not in MLP or (template in ROUTED) == bool(is_routed):
                    yield fill(template, {"layer": str(layer), "leaf": leaf, "expert": "0"})


def _other_biases(tensors: Collection[str], family: Family, config: Mapping[str, Any]) -> str | None:
    """Biases of matrices: those that config.json, or else the family, says there are, and no others."""
    first = {"layer": "0"}
    expected: dict[str, tuple[bool, str]] = {}
    if "add_bias_linear" in family.args:
        linear = bool(family.args["add_bias_linear"])
        expected = dict.fromkeys(LINEAR, (linear, "")) | {names.QKV: (linear or bool(family.args.get("add_qkv_bias")), "")}
    for key, templates in family.biases.items():
        some = any(fill(template, first | {"leaf": "bias"}) in tensors for template in templates)
        told = bool(config.get(key, family.constants[key])) if config else some
        why = f", config.json's {key} is {str(told).lower()}" if config else f", though {key} gives it to all or none"
        expected |= dict.fromkeys(templates, (told, why))
    for template, (has_bias, why) in expected.items():
        name = fill(template, first | {"leaf": "bias"})
        if fill(template, first | {"leaf": "weight"}) in tensors and (name in tensors) != has_bias:
            return f"{name} is {'there' if name in tensors else 'missing'}{why}"
    return None


def as_config(family: Family, tensors: Collection[str]) -> dict[str, Any]:
    """What a config.json that is made says of biases and of layers with experts, where the family leaves them open."""
    first = {"layer": "0", "leaf": "bias"}
    said = {key: any(fill(template, first) in tensors for template in templates) for key, templates in family.biases.items()}
    if names.ROUTER in family.tensors and names.FC1 in family.tensors:
        dense = [layer for layer, is_routed in enumerate(routed(tensors)) if not is_routed]
        said |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return said
