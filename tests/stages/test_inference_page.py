"""docs/inference.md, run as it stands: on a chat model of random weights, and a reward model, over bytes."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from jsonschema import validate
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.cli import main
from rlhf.config.decoding import BatchDecoding
from rlhf.data.chat_world_base import write_base

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "inference.md").read_text()
COMMANDS = re.findall(r"^ {4}(rlhf .*)", PAGE, re.M)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
PROMPTS = ["What is the capital of France?", "Who are you?"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    for name, of in (("ppo", LlamaForCausalLM), ("rm", LlamaForSequenceClassification)):
        model = directory / "runs" / name
        write_base(model, [*PROMPTS, "Paris is the capital of France."])
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig.from_pretrained(model, max_position_embeddings=256, num_labels=1, num_key_value_heads=2, **size)
        of(config).save_pretrained(model)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    (directory / "person.json").write_text(json.dumps(PERSON))
    return directory


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_commands_run(place, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n"))
    for command in COMMANDS:
        assert main(shlex.split(command)[1:]) == 0, command
    assert {command.split()[1] for command in COMMANDS} == {"generate", "chat", "convert"}
    replies, four, people = (rows_of(Path(f"{name}.jsonl")) for name in ("replies", "four", "people"))
    assert [row["prompt"] for row in replies] == PROMPTS
    assert [(row["prompt"], row["sample"]) for row in four] == [(prompt, sample) for prompt in PROMPTS for sample in range(4)]
    for row in people:
        assert row["finished"]
        validate(json.loads(row["response"]), PERSON)
    assert not [row for row in replies if row["response"].startswith("{")]


def test_the_python_runs(place, tmp_path, monkeypatch, capsys):
    (code,) = PYTHON
    (tmp_path / "page.py").write_text(code)
    monkeypatch.chdir(place)
    made = runpy.run_path(str(tmp_path / "page.py"))
    assert re.match(r"0 0 (True|False) ", capsys.readouterr().out)
    assert len(made["replies"]) == len(made["scores"]) == len(set(made["scores"])) == 4
    cut = [not reply.finished for reply in made["replies"]]
    assert any(cut)
    as_ended = made["reward"].score(made["asked"], made["texts"])
    assert [score != pytest.approx(other) for score, other in zip(made["scores"], as_ended, strict=True)] == cut


def test_defaults_on_the_page_are_the_schemas():
    stated = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", PAGE, re.M))
    assert stated.keys() == BatchDecoding.model_fields.keys() - {"json_schema"}
    for name, default in stated.items():
        assert (None if default == "none" else float(default)) == BatchDecoding.model_fields[name].default


def test_json_that_is_cut_is_told(place, tmp_path, capsys):
    pytest.importorskip("llguidance")
    words = [
        "--data",
        str(place / "prompts.jsonl"),
        "--output",
        str(tmp_path / "cut.jsonl"),
        "--json-schema",
        json.dumps(PERSON),
    ]
    assert main(["generate", str(place / "runs" / "ppo"), *words, "--max-new-tokens", "5"]) == 0
    assert "2 of 2 replies were cut before their JSON was complete: raise max_new_tokens" in capsys.readouterr().err
    assert not any(row["finished"] for row in rows_of(tmp_path / "cut.jsonl"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--json-schema", "no.json"], 78, "json_schema no.json: cannot be read: No such file or directory; expected a file"),
        (["--json-schema", '{"type": 3}'], 78, "json_schema: not a JSON Schema that llguidance can follow"),
        (["--top-k", "3", "--top-p", "0.5"], 78, "top_k 3 and top_p 0.5 exclude each other: leave one of them out"),
        (["--top-k", "0", "--top-p", "0"], 78, "top_k and top_p are both 0: give one of them, or leave both out"),
        (["--top-p", "0.5", "--temperature", "0"], 78, "top_p has no meaning with temperature 0"),
        (["--top-p", "1.5"], 78, "top_p: given `1.5`, expected a number, from 0 to 1, or none"),
        (["--repetition-penalty", "0"], 78, "repetition_penalty: given `0`, expected a number, above 0"),
        (["--samples-per-prompt", "2", "--data", "clash.jsonl"], 65, "clash.jsonl:1: has a column 'sample'"),
    ],
)
def test_a_mistake_is_one_message(place, monkeypatch, capsys, words, code, message):
    if "--json-schema" in words:
        pytest.importorskip("llguidance")
    monkeypatch.chdir(place)
    Path("clash.jsonl").write_text('{"prompt": "a", "sample": 1}\n')
    data = [] if "--data" in words else ["--data", "prompts.jsonl"]
    assert main(["generate", "runs/ppo", "--output", "never.jsonl", *data, *words]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("rlhf: error: ") == 1
    assert not Path("never.jsonl").exists()
