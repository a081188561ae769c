"""Tokenizers that do not belong together are refused, with both sides named; pad and EOS may be one token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import command, flags, metrics, run
from safetensors.torch import load_file, save_file


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap_words(model: Path) -> None:
    def swap(tokenizer: dict) -> None:
        words = tokenizer["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    edit(model / "tokenizer.json", swap)


def add_token(model: Path) -> None:
    token = {"id": 10, "content": "<|new|>", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit(model / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(token))


def other_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def pad_is_eos(model: Path) -> None:
    edit(model / "tokenizer_config.json", lambda settings: settings.update(pad_token="<|end|>"))
    edit(model / "config.json", lambda config: config.update(pad_token_id=1))


def cut_rows(model: Path) -> None:
    """Embedding, and head where there is one, with a row less than the tokenizer has ids."""
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.shape[0] == 10:
            weights[name] = tensor[:9].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    edit(model / "config.json", lambda config: config.update(vocab_size=9))


REFUSED = {
    "the critic has a token more": ("critic", add_token, "the tokenizer of the critic"),
    "the reference pads with another token": ("reference", pad_is_eos, "the tokenizer of the reference"),
    "the reference has a chat template": ("reference", other_template, "the template of the reference"),
    "the reward model lacks a row": ("reward", cut_rows, "ids up to 9"),
    "the critic lacks a row": ("critic", cut_rows, "ids up to 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_ppo_refuses_a_tokenizer_that_is_not_the_actors(llamas: Path, tmp_path: Path, name: str) -> None:
    role, change, message = REFUSED[name]
    other = Path(shutil.copytree(llamas / ("model" if role == "reference" else "critic"), tmp_path / "other"))
    change(other)
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", llamas, tmp_path / "run", **{role: other}), log) == 65, log.read_text()
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("rlhf: error:")]
    assert message in error
    assert str(other) in error
    assert str(llamas / "model") in error


def test_a_reward_model_that_reads_other_words_is_given_text(llamas: Path, tmp_path: Path) -> None:
    """Its rows of the embedding are swapped like its words: it reads the same, and so the run is the same."""
    other, log = Path(shutil.copytree(llamas / "critic", tmp_path / "other")), tmp_path / "log"
    swap_words(other)
    weights = load_file(other / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    rows[[2, 3]] = rows[[3, 2]].clone()  # a and b
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for name, reward in (("one", llamas / "critic"), ("two", other)):
        more = {"reward": reward, "schedule__length": 2, "data__eval": "null"}
        assert run("ppo", flags("ppo", llamas, tmp_path / name, **more), log) == 0, log.read_text()
    assert (
        f"the tokenizer of the reward model {other} is not the actor's: it reads replies as text, as plain text"
        in log.read_text()
    )
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for raw in (
            "reward/score",
            "reward/score_std",
            "reward/length_correlation",
        ):  # a random policy says pads, which are no text, where it finds no end
            del one[raw], two[raw]
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
    log.unlink()
    refused = flags("ppo", llamas, tmp_path / "no", reward=other, critic="null")
    assert run("ppo", refused, log) == 65
    assert "set roles.critic to `zero`, or to a model that has the actor's" in log.read_text()


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_token_without_a_row_is_refused(llamas: Path, tmp_path: Path, stage: str) -> None:
    world, log = Path(shutil.copytree(llamas, tmp_path / "world")), tmp_path / "log"
    add_token(world / "model")
    more = {"critic": "zero"} if stage == "ppo" else {}
    assert run(stage, flags(stage, world, tmp_path / "run", **more), log) == 65, log.read_text()
    assert f"{world / 'model'} has ids up to 10, the embedding of {world / 'model'} only 10 rows" in log.read_text()


def test_a_tokenizer_swapped_between_stages_is_refused(llamas: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run("sft", flags("sft", llamas, tmp_path / "sft", schedule__length=1), log) == 0
    swap_words(tmp_path / "sft" / "model")
    assert run("rm", flags("rm", llamas, tmp_path / "rm", model=tmp_path / "sft"), log) == 65
    assert f"{tmp_path / 'sft'} has changed since its sft run finished: model/tokenizer.json" in log.read_text()


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_pad_may_be_eos(llamas: Path, tmp_path: Path, stage: str) -> None:
    """Nothing is told by the id of pad: the same numbers come out, to the bit, as with a pad of its own."""
    world = Path(shutil.copytree(llamas, tmp_path / "world"))
    for part in ("model", "critic"):
        pad_is_eos(world / part)
    reward = {"reward": llamas / "critic"} if stage == "ppo" else {}
    reward_of_same = {"reward": world / "critic"} if stage == "ppo" else {}
    log = tmp_path / "log"
    assert run(stage, flags(stage, llamas, tmp_path / "own", **reward), log) == 0, log.read_text()
    assert run(stage, flags(stage, world, tmp_path / "same", **reward_of_same), log) == 0, log.read_text()
    assert metrics(tmp_path / "own") == metrics(tmp_path / "same")
    own, same = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("own", "same"))
    assert all(own[name].equal(same[name]) for name in own)


def test_eos_is_learned_where_it_is_pad(llamas: Path, tmp_path: Path) -> None:
    """In a chat of two turns EOS is read and predicted: its row of the embedding moves, and replies end by it."""
    world, log = Path(shutil.copytree(llamas, tmp_path / "world")), tmp_path / "log"
    pad_is_eos(world / "model")
    template = "{% for m in messages %}{{ m['content'] }} {{ '<|end|> ' if m['role'] == 'assistant' }}{% endfor %}"
    (world / "model" / "chat_template.jinja").write_text(template)
    turn = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    (world / "sft.jsonl").write_text(json.dumps({"messages": turn + turn}) + "\n")
    more = {"batch_size": 1, "optimizer__lr": 1e-2, "schedule__length": 30}
    assert run("sft", flags("sft", world, tmp_path / "run", **more), log) == 0, log.read_text()
    before, after = (
        load_file(place / "model.safetensors")["model.embed_tokens.weight"]
        for place in (world / "model", tmp_path / "run" / "model")
    )
    assert not before[1].equal(after[1])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n')
    replies = tmp_path / "replies.jsonl"
    arguments = ["generate", str(tmp_path / "run"), "--data", str(tmp_path / "prompts.jsonl"), "--output", str(replies)]
    assert command([*arguments, "--temperature=0", "--max-new-tokens=8"], log) == 0, log.read_text()
    reply = json.loads(replies.read_text())
    assert reply["response"] == "c d"
    assert reply["finished"] is True
