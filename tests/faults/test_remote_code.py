"""A model that brings Python code: nothing of it runs unless a run asks for that, and then the run says so and pins it."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from harness import command, flags, run
from hostile import Runs

from rlhf.cli import main
from rlhf.config.parse import parse
from rlhf.errors import ConfigError, DataError
from rlhf.models.remote_code import check_remote_code
from rlhf.models.source import Source
from rlhf.runs.lineage import inputs_of

WITNESS = "RLHF_TEST_WITNESS"
RUNS = f"import os, pathlib\npathlib.Path(os.environ['{WITNESS}']).touch()\n"
CODE = {
    "configuration_own.py": """\
from transformers import GPT2Config
class OwnConfig(GPT2Config):
    model_type = "own"
""",
    "modeling_own.py": """\
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
from .configuration_own import OwnConfig
class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
class OwnForSequenceClassification(GPT2ForSequenceClassification):
    config_class = OwnConfig
""",
    "tokenization_own.py": """\
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
}
TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def place(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world with models and a tokenizer of a kind of their own, whose files leave a witness when they are run."""
    directory = Path(shutil.copytree(world, tmp_path / "world"))
    for part in ("model", "critic"):
        for name, text in CODE.items():
            (directory / part / name).write_text(RUNS + text)
        changed(directory / part / "config.json", model_type="own", auto_map=AUTO_MAP)
        changed(directory / part / "tokenizer_config.json", **TOKENIZER)
    monkeypatch.setenv(WITNESS, str(tmp_path / "it-ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # a terminal that says yes to all that it is asked
    return directory


def commands(place: Path, out: Path) -> dict[str, list[str]]:
    """Every command that opens a model."""
    model, prompts = str(place / "model"), str(place / "prompts.jsonl")
    (place / "pieces.txt").write_text("ab\n")
    return {
        "generate": ["generate", model, "--data", prompts, "--output", str(out)],
        "eval": ["eval", model, "--data", str(place / "sft.jsonl")],
        "eval of a reward model": ["eval", str(place / "critic"), "--data", str(place / "pairs.jsonl")],
        "convert": ["convert", model, str(out), "--to", "megatron"],
        "vocab": ["vocab", "expand", model, str(out), "--tokens", str(place / "pieces.txt")],
        "fp8": ["fp8", "plan", model],
    }


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_no_stage_runs_it_unasked(place: Path, tmp_path: Path, stage: str) -> None:
    log = tmp_path / "log"
    assert run(stage, flags(stage, place, tmp_path / "run"), log) == 65, log.read_text()
    assert "this model brings Python code of its own, which is not run" in log.read_text()
    assert "--trust-remote-code" in log.read_text()
    assert not (tmp_path / "it-ran").exists()


NAMES = ["generate", "eval", "eval of a reward model", "convert", "vocab", "fp8"]


@pytest.mark.parametrize("name", NAMES)
def test_no_command_runs_it_unasked(place: Path, tmp_path: Path, name: str) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    assert command(commands(place, out)[name], log) == 65, log.read_text()
    assert not (tmp_path / "it-ran").exists()
    assert not out.exists()
    assert "Traceback" not in log.read_text()


def test_a_tokenizer_alone_may_bring_it(place: Path, tmp_path: Path, world: Path) -> None:
    shutil.copy(world / "model" / "config.json", place / "model" / "config.json")
    changed(place / "model" / "tokenizer_config.json", tokenizer_class="Unknown")
    log = tmp_path / "log"
    run("sft", flags("sft", place, tmp_path / "run"), log)
    assert not (tmp_path / "it-ran").exists()


def test_every_command_was_tried(place: Path, tmp_path: Path) -> None:
    assert set(commands(place, tmp_path)) == set(NAMES)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_asked_for_it_runs_and_the_run_says_so(place: Path, tmp_path: Path, stage: str) -> None:
    log, output = tmp_path / "log", tmp_path / "run"
    arguments = flags(stage, place, output, trust_remote_code="true", schedule__length=1)
    assert run(stage, arguments, log) == 0, log.read_text()
    assert (tmp_path / "it-ran").exists()
    manifest = json.loads((output / "run.json").read_text())
    assert manifest["config"]["trust_remote_code"] is True
    name = "actor" if stage == "ppo" else "model"
    assert manifest["inputs"][name]["digest"]


def test_what_was_trained_is_used_with_the_same_flag(place: Path, tmp_path: Path) -> None:
    log, run_directory = tmp_path / "log", tmp_path / "run"
    assert run("sft", flags("sft", place, run_directory, trust_remote_code="true", schedule__length=1), log) == 0
    (tmp_path / "it-ran").unlink()
    arguments = ["generate", str(run_directory), "--data", str(place / "prompts.jsonl"), "--max-new-tokens=3"]
    assert command([*arguments, "--output", str(tmp_path / "without")], log) == 65
    assert not (tmp_path / "it-ran").exists()
    assert command([*arguments, "--output", str(tmp_path / "with"), "--trust-remote-code"], log) == 0, log.read_text()
    assert len((tmp_path / "with").read_text().splitlines()) == 29


def test_the_code_is_in_the_digest_of_what_was_read(place: Path, tmp_path: Path) -> None:
    config = parse("sft", flags("sft", place, tmp_path / "run", trust_remote_code="true")).config
    before = inputs_of("sft", config)["model"]["digest"]
    file = place / "model" / "modeling_own.py"
    file.write_text(file.read_text() + "# one more line\n")
    assert inputs_of("sft", config)["model"]["digest"] != before


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0", "@" + "a" * 39, "@" + "A" * 40, "@" + "a" * 41])
def test_a_hub_model_must_be_pinned(tmp_path: Path, world: Path, revision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = flags("sft", world, tmp_path / "run", model=f"somebody/model{revision}", trust_remote_code="true")
    assert main(["sft", *arguments]) == 78
    assert "trust_remote_code: somebody/model must be pinned" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="must be pinned"):
        check_remote_code(Source("hub", "somebody/model", revision[1:] or None, None), trusted=True)


def test_a_pinned_hub_model_passes(tmp_path: Path, world: Path) -> None:
    arguments = flags("sft", world, tmp_path / "run", model=f"somebody/model@{'0a' * 20}", trust_remote_code="true")
    assert inputs_of("sft", parse("sft", arguments).config)["model"]["path"] == f"somebody/model@{'0a' * 20}"


@pytest.mark.parametrize("reference", ["other/repo--modeling_own.OwnForCausalLM", "/etc/own.Own", "../own.Own"])
def test_code_that_is_not_beside_the_weights_is_refused_even_so(place: Path, reference: str) -> None:
    """Such a class would come from another repository's newest revision, or from a file that no digest covers."""
    check_remote_code(Source("directory", str(place / "model"), None, None), trusted=True)
    changed(place / "model" / "config.json", auto_map=AUTO_MAP | {"AutoModelForCausalLM": reference})
    with pytest.raises(DataError, match="does not lie beside the weights"):
        check_remote_code(Source("directory", str(place / "model"), None, None), trusted=True)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_pickle_in_the_place_of_weights_runs_nothing(world: Path, tmp_path: Path, stage: str) -> None:
    place, log = Path(shutil.copytree(world, tmp_path / "world")), tmp_path / "log"
    (place / "model" / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Runs(os.mkdir, str(tmp_path / "it-ran"))}, place / "model" / "pytorch_model.bin")
    assert run(stage, flags(stage, place, tmp_path / "run"), log) == 65, log.read_text()
    assert not (tmp_path / "it-ran").exists()
    assert "refused, nothing of it was run: it wants posix.mkdir" in log.read_text()
    assert "weights_only" not in log.read_text(), "torch's advice is to run it"
