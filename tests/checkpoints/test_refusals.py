"""What is wrong is refused, or fails the proof, with the tensor or the file named; nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from rewrite import edit, rewrite
from safetensors.torch import load_file, save_file
from tiny import build

from rlhf.checkpoints import operations
from rlhf.checkpoints.convert import Request, plan
from rlhf.checkpoints.plan import Entry, TargetFile
from rlhf.checkpoints.sinks import open_sink
from rlhf.checkpoints.sizes import Grid
from rlhf.checkpoints.verify import verify
from rlhf.checkpoints.writing import write
from rlhf.errors import CheckFailed, DataError, OutputError, StorageError, UsageError

FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with grouped keys, and its Megatron files at TP 2 x PP 2."""
    home = tmp_path_factory.mktemp("llama")
    build("llama-gqa", home / "hf")
    write(plan(Request(home / "hf", home / "megatron", "megatron", grid=Grid(2, 2))))
    return home


@pytest.fixture
def megatron(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "megatron", tmp_path / "megatron"))


def convert(megatron: Path, reference: Path) -> None:
    conversion = plan(Request(megatron, megatron.with_name("out"), "hf"))
    write(conversion)
    verify(conversion, reference)


def halves_swapped(fc1: torch.Tensor) -> torch.Tensor:
    return torch.cat(fc1.chunk(2)[::-1])


def groups_permuted(fused: torch.Tensor) -> torch.Tensor:
    return torch.cat(fused.chunk(2)[::-1])


@pytest.mark.parametrize(
    ("key", "change", "named"),
    [
        (FC1, halves_swapped, r"model\.layers\.1\.mlp\.gate_proj\.weight"),
        (QKV, groups_permuted, r"model\.layers\.1\.self_attn\.q_proj\.weight"),
    ],
)
def test_swapped_weights_fail_against_a_reference(home, megatron, key, change, named) -> None:
    rewrite(megatron, edit(key, change))
    with pytest.raises(CheckFailed, match=f"not the same model.*{named}"):
        convert(megatron, home / "hf")


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("join_ranks", lambda parts, dim, gated=False: torch.cat(list(parts), dim)),
        ("split_qkv", lambda fused, heads: tuple(fused.split([64, 32, 32]))),
    ],
)
def test_a_wrong_conversion_fails_against_its_own_source(megatron, monkeypatch, function, wrong) -> None:
    import rlhf.checkpoints.megatron as reader

    monkeypatch.setattr(operations, function, wrong)
    if hasattr(reader, function):
        monkeypatch.setattr(reader, function, wrong)
    conversion = plan(Request(megatron, megatron.with_name("out"), "hf"))
    write(conversion)
    with pytest.raises(CheckFailed, match="not the same model"):
        verify(conversion)


def test_a_wrong_rotary_base_fails(home, megatron) -> None:
    conversion = plan(Request(megatron, megatron.with_name("out"), "hf", rotary_base=500.0))
    write(conversion)
    with pytest.raises(CheckFailed, match="not the same model"):
        verify(conversion, home / "hf")


def drop(key):
    return lambda content: content["model"].pop(key, None)


@pytest.mark.parametrize(
    ("change", "pattern", "message"),
    [
        (drop(FC1), "*_000", r"decoder\.layers\.1\.mlp\.linear_fc1\.weight is missing; layer 3 has its own"),
        (drop(FC1), "mp_rank_01_000", r"decoder\.layers\.1\.mlp\.linear_fc1\.weight is missing on tensor rank 1"),
        (drop("decoder.final_layernorm.weight"), "*", r"decoder\.final_layernorm\.weight is missing"),
        (
            lambda content: content["model"].update({"decoder.layers.1.mlp.dense_h_to_4h.weight": torch.zeros(96, 64)}),
            "*_000",
            r"decoder\.layers\.1\.mlp\.dense_h_to_4h\.weight: not a tensor of this layout; nearest",
        ),
        (
            lambda content: content["model"].update({"encoder.layers.1.mlp.dense_h_to_4h.weight": torch.zeros(96, 64)}),
            "*_000",
            r"(linear_fc1|dense_h).* and .*(linear_fc1|dense_h).* are both decoder\.layers\.1\.mlp\.linear_fc1\.weight",
        ),
        (edit(FC1, lambda fc1: fc1[:-2]), "mp_rank_01_000", r"linear_fc1\.weight: \(94, 64\).*\(96, 64\)"),
        (
            edit("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", lambda norm: norm + 1),
            "mp_rank_01_000",
            r"layer_norm_weight: must be equal to .*mp_rank_00_000",
        ),
        (lambda content: setattr(content["args"], "num_layers", 6), "*", r"num_layers 4, its args say 6"),
        (lambda content: setattr(content["args"], "num_attention_heads", 6), "*", r"6 attention heads do not fit"),
        (lambda content: setattr(content["args"], "num_query_groups", 2), "*", r"args\.num_query_groups is 2.*4 groups"),
        (
            lambda content: setattr(content["args"], "tensor_model_parallel_size", 4),
            "*",
            r"holds 2 tensor-parallel ranks, its args say 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(home, megatron, change, pattern, message) -> None:
    rewrite(megatron, change, pattern)
    config = (megatron / "config.json").read_text()
    if "heads" in message or "groups" in message:  # the args alone
        (megatron / "config.json").unlink()
    with pytest.raises(DataError, match=message):
        convert(megatron, home / "hf")
    assert config
    assert not megatron.with_name("out").exists()
    assert not list(megatron.parent.glob(".out*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "release" / "mp_rank_01_001"), "tensor rank 1, pipeline rank 1.*is missing"),
        (lambda root: (root / "release" / "mp_rank_01_001" / "model_optim_rng.pt").unlink(), "mp_rank_01_001: no model_optim"),
        (lambda root: (root / "release" / "mp_rank_01_001").rename(root / "release" / "mp_rank_xx"), "mp_rank_xx: the name"),
        (
            lambda root: (root / "latest_checkpointed_iteration.txt").write_text("../../x"),
            "expected the number of an iteration",
        ),
        (lambda root: (root / "latest_checkpointed_iteration.txt").write_text("7"), "iter_0000007: no such directory"),
    ],
)
def test_files_that_are_not_there(megatron, damage, message) -> None:
    damage(megatron)
    with pytest.raises(DataError, match=message):
        plan(Request(megatron, megatron.with_name("out"), "hf"))


def test_a_config_of_another_model(home, megatron) -> None:
    config = json.loads((megatron / "config.json").read_text())
    (megatron / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    with pytest.raises(DataError, match=r"config\.json: hidden_size is 128, the tensors have 64"):
        convert(megatron, home / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"), r"gate_proj.* is there, .*2\.mlp\.up_proj.*missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"decoder\.final_layernorm\.weight is missing"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(4)}),
            r"mlp\.gate\.weight: not a tensor",
        ),
        (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("model.layers.1.")],
            "layer 1 is missing; layer 2 is there",
        ),
    ],
)
def test_a_hugging_face_directory_that_is_not_whole(home, tmp_path, change, message) -> None:
    source = Path(shutil.copytree(home / "hf", tmp_path / "hf"))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(DataError, match=message):
        plan(Request(source, tmp_path / "out", "megatron"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": Grid(3)}, "--tp 3: the model's 8 attention heads"),
        ({"grid": Grid(8)}, "--tp 8: the model's 4 groups"),
        ({"grid": Grid(1, 3)}, "--pp times --vpp 3: the model's 4 layers"),
        ({"grid": Grid(1, 1, 2)}, "--vpp"),
    ],
)
def test_ranks_that_do_not_divide(home, tmp_path, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        plan(Request(home / "hf", tmp_path / "out", "megatron", **options))


def test_nothing_is_overwritten_and_a_killed_attempt_is_cleared(home, tmp_path) -> None:
    request = Request(home / "megatron", tmp_path / "out", "hf")
    left = tmp_path / f".out-{socket.gethostname()}-999999999.partial"
    left.mkdir()
    write(plan(request))
    assert not left.exists()
    with pytest.raises(OutputError, match="is there already and not empty"):
        write(plan(request))


def test_a_full_disk_is_known_before(home, tmp_path, monkeypatch) -> None:
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 1000))
    with pytest.raises(StorageError, match="bytes are needed, 1,000 are free"):
        write(plan(Request(home / "megatron", tmp_path / "out", "hf")))
    assert not list(tmp_path.iterdir())


def test_the_manifest_has_a_digest_for_each_tensor(home, tmp_path) -> None:
    import hashlib

    write(plan(Request(home / "megatron", tmp_path / "out", "hf", shard_bytes=100_000)))
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    tensors = {f"{shard.name}: {key}": tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert manifest["tensors"] == {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()
    }
    for file, digest in manifest["source_files"].items():
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == digest


def test_families_without_a_model_say_so(tmp_path) -> None:
    torch.manual_seed(0)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        layer + "self_attn.W_pack.weight": (192, 64),
        layer + "self_attn.o_proj.weight": (64, 64),
        layer + "mlp.gate_proj.weight": (96, 64),
        layer + "mlp.up_proj.weight": (96, 64),
        layer + "mlp.down_proj.weight": (64, 96),
        layer + "input_layernorm.weight": (64,),
        layer + "post_attention_layernorm.weight": (64,),
        "model.norm.weight": (64,),
        "lm_head.weight": (100, 64),
    }
    (tmp_path / "hf").mkdir()
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "hf" / "model.safetensors")
    config = {"model_type": "baichuan", "num_attention_heads": 4, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 100}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    write(conversion := plan(Request(tmp_path / "hf", tmp_path / "m", "megatron", grid=Grid(2))))
    with pytest.raises(CheckFailed, match="tensor mapping only: transformers has no model of it"):
        verify(conversion)
    write(plan(Request(tmp_path / "m", tmp_path / "back", "hf")))
    first, second = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_tensor_of_another_type_than_planned_is_not_written(home, tmp_path) -> None:
    conversion = plan(Request(home / "hf", tmp_path / "out", "megatron"))
    step = conversion.target.steps[3]
    lying = replace(step.source, read=lambda: step.source.read().double())
    conversion.target.steps[3] = replace(step, source=lying)
    with pytest.raises(DataError, match=r"float64, planned as .*float32"):
        write(conversion)
    assert not (tmp_path / "out").exists()
    conversion.target.steps[3] = step
    write(conversion)  # the negative control


def test_a_sink_takes_no_more_than_the_place_it_laid_out(tmp_path) -> None:
    file = TargetFile("model.safetensors", "safetensors", {"a": Entry((4,), torch.float32), "b": Entry((4,), torch.float32)})
    sink = open_sink(tmp_path, file)
    with pytest.raises(DataError, match="a: 32 bytes for a place of 16"):
        sink.write("a", torch.ones(4, dtype=torch.float64))
    sink.write("a", torch.ones(4))
    sink.close()
    assert load_file(tmp_path / "model.safetensors")["b"].tolist() == [0, 0, 0, 0]


def test_what_another_left_unfinished(home, tmp_path) -> None:
    """A dead process's of this host is cleared; a live one's, another host's and another destination's are not."""
    here = socket.gethostname()
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    kept = [f".m[1]-{here}-{os.getppid()}.partial", f".m[1]-elsewhere-{dead}.partial", f".m1-{here}-{dead}.partial"]
    for name in (*kept, f".m[1]-{here}-{dead}.partial"):
        (tmp_path / name).mkdir()
    write(plan(Request(home / "hf", tmp_path / "m[1]", "megatron")))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "m[1]"])


def test_all_is_on_disk_before_it_has_its_name(home, tmp_path, monkeypatch) -> None:
    """Order of system calls: each file and directory of the result is synced, then it is renamed, then its parent is synced."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, to: Path) -> Path:
        calls.append("renamed")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write(plan(Request(home / "hf", tmp_path / "out", "megatron", grid=Grid(2, 1))))
    at = calls.index("renamed")
    before = {re.sub(r"^.*\.partial", "out", call) for call in calls[:at]}
    assert before == {"out", *(str(path.relative_to(tmp_path)) for path in (tmp_path / "out").rglob("*"))}
    assert calls[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3000 * 70, dtype=torch.float32).view(70, 3000).t(),  # rows of 280 bytes, many in a chunk
        torch.arange(4 * 50_000, dtype=torch.float32).view(4, 50_000)[:, :40_000],  # rows longer than a chunk
        torch.arange(7, dtype=torch.int16)[:, None].expand(7, 300),
        torch.tensor(3.0),
    ],
    ids=["transposed", "long rows", "one column repeated", "a number"],
)
def test_a_tensor_is_written_in_the_order_of_its_rows(tensor, tmp_path) -> None:
    file = TargetFile("one.safetensors", "safetensors", {"a": Entry(tuple(tensor.shape), tensor.dtype)})
    sink = open_sink(tmp_path, file)
    digest = sink.write("a", tensor)
    sink.close()
    assert torch.equal(load_file(tmp_path / "one.safetensors")["a"], tensor)
    assert digest == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("target", ["hf", "megatron"])
def test_a_reward_model_is_refused_by_name(target: Literal["hf", "megatron"], home: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(home / "hf", tmp_path / "rm"))
    save_file({**load_file(model / "model.safetensors"), "score.weight": torch.ones(1, 4)}, model / "model.safetensors")
    with pytest.raises(DataError, match=r"a reward model \(score\.weight\)"):
        plan(Request(model, tmp_path / "out", target))
