"""What a user's words for a model lead to, one line for each kind, and what is said when they lead nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.models.source import Source, resolve


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(file: str, text: str = "{}") -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def make_run(path: str, stage: str, *results: str, finished: str | None = "2026-01-01T00:00:00+00:00") -> None:
    write(f"{path}/run.json", json.dumps({"stage": stage, "finished": finished}))
    for result in results:
        write(f"{path}/{result}/config.json")


def test_directories_and_files() -> None:
    write("hf/config.json")
    write("lora/adapter_config.json")
    write("m.gguf")
    assert resolve("hf") == Source("directory", "hf", None, None)
    assert resolve("lora/") == Source("directory", "lora", None, None)
    assert resolve("m.gguf") == Source("gguf", "m.gguf", None, None)


def test_runs() -> None:
    make_run("runs/sft", "sft", "model")
    make_run("runs/ppo", "ppo", "model", "critic")
    assert resolve("runs/sft") == Source("directory", "runs/sft/model", None, Path("runs/sft"))
    assert resolve("runs/sft", "critic") == resolve("runs/sft")
    assert resolve("runs/ppo").path == "runs/ppo/model"
    assert resolve("runs/ppo", "critic").path == "runs/ppo/critic"


def test_hub_ids() -> None:
    assert resolve("HuggingFaceTB/SmolLM2-135M") == Source("hub", "HuggingFaceTB/SmolLM2-135M", None, None)
    assert resolve("owner/name@v1.0") == Source("hub", "owner/name", "v1.0", None)
    assert resolve("owner/name@refs/pr/1") == Source("hub", "owner/name", "refs/pr/1", None)


@pytest.mark.parametrize("spec", ["./model", "../model", "gpt2", "a/b/c", "m.gguf", "models/m.gguf", "runs/missing"])
def test_nothing_there(spec: str) -> None:
    Path("runs").mkdir()
    with pytest.raises(DataError, match=r"Looked for a run directory, .*config.json.*gguf.*owner/name"):
        resolve(spec)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("m/iter_0000010/mp_rank_00/model_optim_rng.pt", "Megatron.*name one of its iterations"),
        ("m/tokenizer.json", "no config.json.*It holds tokenizer.json"),
    ],
)
def test_a_directory_that_is_no_model(file: str, message: str) -> None:
    write(file)
    with pytest.raises(DataError, match=message):
        resolve("m")


@pytest.mark.parametrize("file", ["latest_checkpointed_iteration.txt", "mp_rank_00/model_optim_rng.pt", "__0_0.distcp"])
def test_megatron_checkpoints(file: str) -> None:
    write(f"m/{file}")
    write("m/config.json")  # left beside the weights by converters
    assert resolve("m") == Source("megatron", "m", None, None)


def test_an_empty_directory_and_a_file_of_another_kind() -> None:
    Path("empty").mkdir()
    write("weights.bin")
    with pytest.raises(DataError, match="It holds nothing"):
        resolve("empty")
    with pytest.raises(DataError, match="a file of another kind"):
        resolve("weights.bin")


def test_a_run_must_be_finished() -> None:
    make_run("rm", "rm", "model", finished=None)
    with pytest.raises(DataError, match="this rm run is not finished"):
        resolve("rm")


def test_a_run_without_the_result() -> None:
    make_run("world", "world")
    make_run("ppo", "ppo", "model")
    with pytest.raises(DataError, match="this world run has no model/"):
        resolve("world")
    with pytest.raises(DataError, match="this ppo run has no critic/"):
        resolve("ppo", "critic")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"stage": "sft"}'])
def test_a_broken_manifest(manifest: str) -> None:
    write("sft/run.json", manifest)
    with pytest.raises(DataError, match=r"sft/run\.json: not the manifest of a run"):
        resolve("sft")
