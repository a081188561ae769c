"""What a model computes beside its sizes goes along in both directions, or the conversion stops, or says it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rewrite import content_of, copied, differing, rewrite
from tiny import NATIVE, build

from rlhf.checkpoints.convert import Conversion, Request, plan
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import DataError


def made(megatron: Path, change: dict[str, Any], **options: Any) -> Conversion:
    """A plan to Hugging Face after a change to args."""
    rewrite(megatron, lambda content: vars(content["args"]).update(change))
    return plan(Request(megatron, megatron.with_name("out"), "hf", **options))


def built(name: str, directory: Path, **changes: Any) -> Path:
    """A tiny model with other settings, as Hugging Face files."""
    build(name, directory / "hf", **changes)
    return directory / "hf"


def to_megatron(source: Path) -> tuple[Conversion, dict[str, Any]]:
    """The conversion, and the args it wrote."""
    write(conversion := plan(Request(source, source.with_name("megatron"), "megatron")))
    args = content_of(next(source.parent.glob("megatron/release/*/*.pt")))["args"]
    return conversion, vars(args)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rotary_percent": 0.5}),
        ("llama", {"rotary_interleaved": True}),
        ("llama", {"window_size": (4, 0)}),
        ("llama", {"squared_relu": True}),
        ("mixtral", {"moe_router_pre_softmax": True}),
        ("mixtral", {"moe_router_score_function": "sigmoid"}),
        ("qwen3_moe", {"moe_router_topk_scaling_factor": 2.5}),
        ("gpt2", {"openai_gelu": True}),
    ],
)
def test_args_that_a_config_json_made_here_would_not_say(models, tmp_path, name, change) -> None:
    megatron = copied(models, tmp_path, name)
    made(megatron, {}, family=name)
    (argument,) = change
    with pytest.raises(DataError, match=f"its args say {argument} .*give --config"):
        made(megatron, change, family=name)
    warnings = made(megatron, {}, config=tmp_path / "hf").warnings
    assert any(argument in warning for warning in warnings) == (argument != "openai_gelu")  # GPT-2's config.json has it, too


def test_args_of_a_router_in_a_dense_model_say_nothing(models, tmp_path) -> None:
    made(copied(models, tmp_path, "llama"), {"moe_router_score_function": "sigmoid", "rotary_percent": 1.0})


def test_rope_scaling_comes_from_args(models, tmp_path) -> None:
    conversion = made(copied(models, tmp_path, "llama"), {"use_rope_scaling": True, "rope_scaling_factor": 32.0})
    assert conversion.config["rope_parameters"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 10000.0,
    }
    assert made(tmp_path / "megatron", {"use_rope_scaling": False}).config["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}, r"num_attention_heads is 4, config\.json says 8"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "groups in config.json is 2, its tensors hold 4"),
    ],
)
def test_a_config_of_other_heads(models, tmp_path, change, message) -> None:
    megatron = copied(models, tmp_path, "llama")
    assert differing(megatron, config=tmp_path / "hf") == []
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=message):
        plan(Request(megatron, tmp_path / "out", "hf", config=tmp_path / "hf"))


def test_what_config_json_overrides_is_said(models, tmp_path) -> None:
    megatron = copied(models, tmp_path, "llama")
    assert not made(megatron, {}, config=tmp_path / "hf").warnings
    warnings = made(megatron, {"rotary_base": 500000, "norm_epsilon": 1e-3}, config=tmp_path / "hf").warnings
    assert [warning for warning in warnings if "rotary_base 500000" in warning and "10000.0" in warning]
    assert [warning for warning in warnings if "norm_epsilon 0.001" in warning and "1e-06" in warning]
    assert len(warnings) == 2


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", {}, {"use_rope_scaling": None, "window_size": None}),
        ("mistral", {"sliding_window": 5}, {"window_size": (4, 0)}),
        (
            "llama",
            {
                "rope_parameters": NATIVE["llama3-rope"][1]["rope_parameters"] | {"original_max_position_embeddings": 8192},
            },
            {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
            {"rotary_seq_len_interpolation_factor": 4.0},
        ),
        ("falcon-7b", {"alibi": True}, {"position_embedding_type": "alibi"}),
        ("falcon-7b", {}, {"position_embedding_type": "rope"}),
    ],
)
def test_what_megatrons_args_can_say_is_written(tmp_path, name, changes, expected) -> None:
    conversion, args = to_megatron(built(name, tmp_path, **changes))
    assert {key: args.get(key) for key in expected} == expected
    assert not [warning for warning in conversion.warnings if "scales" in warning or "window" in warning]
    if not changes.get("alibi"):  # Falcon scales its slopes, too; our forward pass knows BLOOM's
        verify(conversion)
    back = plan(Request(tmp_path / "megatron", tmp_path / "back", "hf"))
    assert back.warnings == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3-rope", {}, r"scales rotary positions \(llama3\)"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu; Megatron computes SiLU"),
        ("opt", {"activation_function": "relu"}, "activation is relu; Megatron computes the exact GELU"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, "window of 4 in some layers"),
        ("falcon-7b", {"alibi": True}, "Falcon's ALiBi"),
        ("falcon-7b", {}, ""),
        ("qwen2", {"sliding_window": 4}, ""),
        ("llama", {}, ""),
    ],
)
def test_what_they_cannot_say_is_a_warning(tmp_path, name, changes, message) -> None:
    conversion, _ = to_megatron(built(name, tmp_path, **changes))
    if message:
        (warning,) = conversion.warnings
        assert re.search(message, warning)
    else:
        assert conversion.warnings == []


def stripped(source: Path) -> Path:
    to_megatron(source)
    (source.parent / "megatron" / "config.json").unlink()
    return source.parent / "megatron"


@pytest.mark.parametrize(
    ("name", "changes", "family", "expected"),
    [
        ("gpt2", {"n_inner": 128}, "gpt2", {"n_inner": 128}),
        ("starcoder-heads", {}, "starcoder", {"multi_query": False}),
        ("starcoder", {}, "starcoder", {"multi_query": True}),
        ("falcon-7b", {"multi_query": False}, "falcon_7b", {"multi_query": False}),
        ("falcon-7b", {}, "falcon_7b", {"multi_query": True}),
        ("llama-bias-tied", {}, "llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"mlp_bias": True}, "llama", {"attention_bias": False, "mlp_bias": True}),
        ("llama", {}, "llama", {"attention_bias": False, "mlp_bias": False}),
    ],
)
def test_a_config_json_made_here_says_what_the_tensors_have(tmp_path, name, changes, family, expected) -> None:
    source = built(name, tmp_path, **changes)
    conversion = plan(Request(stripped(source), tmp_path / "out", "hf", family=family))
    assert {key: conversion.config[key] for key in expected} == expected
    write(conversion)
    if name not in ("gpt2", "starcoder", "starcoder-heads"):  # config.json says the exact GELU, as Megatron's args do
        verify(conversion, source)


def test_what_a_family_has_no_key_for_is_refused(tmp_path) -> None:
    megatron = stripped(built("qwen2", tmp_path, head_dim=32))
    with pytest.raises(DataError, match=r"kv_channels 32, and a qwen2 config\.json made here would mean 16; give --config"):
        plan(Request(megatron, tmp_path / "out", "hf", family="qwen2"))
    assert plan(Request(megatron, tmp_path / "out", "hf", config=tmp_path / "hf"))


def test_a_new_rotary_base_keeps_the_scaling_of_an_old_config(tmp_path) -> None:
    source = built("llama3-rope", tmp_path)
    config = json.loads((source / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(config))
    conversion = plan(Request(source, tmp_path / "out", "hf", rotary_base=20000.0))
    assert conversion.config["rope_parameters"] == scaling | {"rope_theta": 20000.0}
