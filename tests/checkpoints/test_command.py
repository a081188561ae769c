"""`rlhf convert` as a command: what it prints, and how quickly it plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import build
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.checkpoints.directory import weight_files
from rlhf.cli import main


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build("llama-gqa", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "chat_template.jinja").write_text("hello")
    return tmp_path


def test_a_dry_run_names_every_tensor_and_touches_nothing(here, capsys) -> None:
    assert main(["convert", "hf", "out", "--to", "megatron", "--tp", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "hf/model.safetensors: model.layers.3.mlp.up_proj.weight" in shown
    assert "-> release/mp_rank_01/model_optim_rng.pt: model/decoder.layers.3.mlp.linear_fc1.weight [96, 64]" in shown
    assert "gate over up; split over 2 ranks by dimension 0, gate and up apart" in shown
    assert not Path("out").exists()
    assert main(["convert", "hf", "out", "--to", "megatron", "--tp", "2", "--dry-run", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    sources = [source for step in described["steps"] for source in step["sources"]]
    targets = [target for step in described["steps"] for target in step["targets"]]
    assert len(sources) == len(set(sources)) == 4 * 9 + 3
    assert len(targets) == len(set(targets)) == 2 * (4 * 6 + 3)


def test_there_and_back_with_all_that_stands_beside(here, capsys) -> None:
    assert main(["convert", "hf", "out", "--to", "megatron", "--pp", "2", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "top-1 agrees on 100.0%, greedy continuation the same" in shown
    assert main(["convert", "out", "back", "--to", "hf", "--verify", "--reference", "hf", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["verified"]["holds"] is True
    assert outcome["verified"]["max_difference"] == 0
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert Path("back", name).read_text() == Path("hf", name).read_text() or name == "config.json"
    assert json.loads(Path("back/config.json").read_text())["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["hf"], 2, "destination"),
        (["hf", "out"], 2, "--to"),
        (["hf", "out", "--to", "gguf"], 2, "invalid choice"),
        (["hf", "out", "--to", "megatron", "--tp", "0"], 2, "at least 1"),
        (["hf", "out", "--to", "hf", "--reference", "hf"], 2, "--verify"),
        (["nowhere", "out", "--to", "hf"], 65, "no such directory"),
        (["hf", "hf", "--to", "megatron"], 73, "already"),
        (["hf", "empty", "--to", "megatron"], 0, ""),
        (["hf", "link", "--to", "megatron"], 73, "link: a link"),
        (["hf", "empty/..", "--to", "megatron"], 73, "name the directory itself"),
        (["hf", "out", "--to", "megatron", "--verify", "--reference", "empty"], 65, r"empty/config\.json"),
        (["hf", "out", "--to", "megatron", "--verify", "--reference", "weightless"], 65, "weightless: no weights"),
        (["adapter", "out", "--to", "megatron"], 2, "--to hf merges it"),
        (["adapter", "out", "--to", "hf", "--verify"], 2, "--verify: adapter is a LoRA adapter"),
        (["adapter", "out", "--to", "hf", "--config", "hf"], 2, "--config: adapter is a LoRA adapter"),
        (["adapter", "out", "--to", "hf", "--family", "llama"], 2, "--family: adapter is a LoRA adapter"),
        (["adapter", "empty", "--to", "hf"], 73, "already"),
        (["hf", "out", "--to", "megatron", "--family", "lama"], 65, "there is no such family; there are baichuan"),
        (["hf", "out", "--to", "megatron", "--family", "gpt2"], 65, "is of llama"),
        (["hf", "out", "--to", "bf16"], 65, "nothing to do"),
    ],
)
def test_a_mistake_is_one_message(here, capsys, words, code, message) -> None:
    import re

    for name in ("empty", "weightless", "adapter"):
        Path(name).mkdir()
    Path("link").symlink_to("empty", target_is_directory=True)
    Path("weightless/config.json").write_text("{}")
    Path("adapter/adapter_config.json").write_text("{}")
    assert main(["convert", *words]) == code
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not Path("out").exists()


def test_the_directory_one_stands_in_is_no_destination(here, capsys, monkeypatch) -> None:
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert main(["convert", "../hf", ".", "--to", "megatron"]) == 73
    assert "name the directory itself" in capsys.readouterr().err
    assert not any(Path().iterdir())


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_a_dry_run_merges_no_adapter(here, capsys, json_too) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    assert main(["convert", "adapter", "out", "--to", "hf", "--dry-run", *json_too]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["destination"] == "out" if json_too else "would be merged" in shown
    assert not Path("out").exists()


def test_what_fails_its_proof_stays_and_is_said_to(here, capsys) -> None:
    build("llama-gqa", Path("other"), seed=1)
    assert main(["convert", "hf", "out", "--to", "megatron", "--verify", "--reference", "other"]) == 1
    assert "out stays where it is, and is unproven" in capsys.readouterr().err
    assert Path("out/conversion.json").is_file()
    assert main(["convert", "hf", "again", "--to", "megatron", "--verify", "--reference", "hf"]) == 0
    assert "unproven" not in capsys.readouterr().err


def test_the_files_hashed_ahead_are_those_the_manifest_names(here) -> None:
    (here / "hf" / "model-00002-of-00002.safetensors").symlink_to("nowhere")
    for source, destination, options in (
        ("hf", "torch", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
        ("hf", "dist", ["--to", "megatron", "--layout", "torch_dist"]),
        ("torch", "back", ["--to", "hf"]),
        ("dist", "back_again", ["--to", "hf"]),
    ):
        assert main(["convert", source, destination, *options]) == 0
        named = json.loads(Path(destination, "conversion.json").read_text())["source_files"]
        large = {file for file in named if Path(file).name not in (".metadata", "common.pt")}
        assert {str(file) for file in weight_files(Path(source))} == large


def test_planning_imports_no_transformers(here) -> None:
    """Two seconds is what a plan may take beyond torch; transformers alone would take them."""
    code = (
        "import sys; from rlhf.cli import main; main(['convert', 'hf', 'out', '--to', 'megatron', '--dry-run']); "
        "sys.exit('transformers' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("positions", [2, 6, 19])
def test_a_model_of_few_positions_is_proven_within_them(positions: int, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=positions, vocab_size=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "megatron", "--verify"]) == 0
    assert "top-1 agrees on 100.0%" in capsys.readouterr().out
