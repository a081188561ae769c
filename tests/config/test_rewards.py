"""A reward of several sources: how it is written, and what is said where it is not right. Places are counted by hand."""

from __future__ import annotations

import json

import pytest

from rlhf.config.load import load, to_json
from rlhf.config.parse import parse
from rlhf.config.schema import PpoConfig
from rlhf.errors import ConfigError

HEAD = "output: o\nroles: {actor: a, critic: zero}\ndata: {train: t}\n"
SEVERAL = """\
reward:
  sources:
    helpful: {source: rm, weight: 0.5}
    brief:
      source: mine.py:brief
"""


def read(tmp_path, text: str, *flags: tuple[str, str]) -> PpoConfig:
    (tmp_path / "ppo.yaml").write_text(HEAD + text)
    return load(PpoConfig, tmp_path / "ppo.yaml", flags)


def test_a_file_and_flags_over_it(tmp_path):
    flags = ("reward.sources.brief.weight", "-2"), ("reward.sources.se-cond.source", "count:a")
    with pytest.raises(ConfigError, match="se-cond is no name for a source"):
        read(tmp_path, SEVERAL, *flags)
    config = read(
        tmp_path, SEVERAL, flags[0], ("reward.sources.My_own.minus-answer", "true"), ("reward.sources.My_own.source", "x")
    )
    found = {name: (part.source, part.weight, part.minus_answer) for name, part in config.reward.parts.items()}
    assert found == {"helpful": ("rm", 0.5, False), "brief": ("mine.py:brief", -2.0, False), "My_own": ("x", 1.0, True)}
    assert config.reward.models == {"helpful": "rm", "My_own": "x"}
    (tmp_path / "again.json").write_text(to_json(config))
    assert load(PpoConfig, tmp_path / "again.json") == config


def test_one_source_is_one_part(tmp_path):
    config = read(tmp_path, "reward: {source: rm, weight: 3}\n")
    assert {name: (part.source, part.weight) for name, part in config.reward.parts.items()} == {"reward": ("rm", 1.0)}
    single = parse("ppo", ["--actor=a", "--data=d", "--output=o", "--reward.sources.one.source=rm"]).config
    assert single.reward.models == {"one": "rm"}


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (SEVERAL + "      wieght: 1\n", "9:7: reward.sources.brief.wieght", "did you mean `reward.sources.brief.weight`?"),
        (SEVERAL + "      weight: much\n", "9:15: reward.sources.brief.weight", "given `much`, expected a number"),
        (SEVERAL + "    third: {weight: 1}\n", "9:5: reward.sources.third.source", "missing"),
        (SEVERAL + "    third: rm\n", "9:12: reward.sources.third", "given `rm`, expected the fields of a section (source,"),
        (SEVERAL + "    score: {source: rm}\n", "5:3: reward.sources", "score is the name of another metric"),
        (SEVERAL + "    brief_std: {source: rm}\n", "5:3: reward.sources", "brief_std is the name of another metric"),
        (SEVERAL + "  source: rm\n", "9:11: reward", "both are given"),
        (SEVERAL + "  minus_answer: true\n", "9:17: reward", "minus_answer is of each source"),
        ("reward: {clip: 1}\n", "4:1: reward", "neither is given"),
        ("reward: {source: rm, combine: min}\n", "4:31: reward", "combine is for several"),
        ("reward: {source: rm, answer: gold}\n", "4:30: reward", "answer has no meaning without verify or minus_answer"),
        ("reward: {source: 'verify:exact', minus_answer: true}\n", "4:48: reward", "minus_answer has no meaning with verify"),
        ("reward: {source: 'verify:all'}\n", "4:18: reward", "there are verify:exact, verify:numeric, verify:regex"),
        ("reward: {source: rm, length_budget: 3}\n", "4:37: reward", "length_budget has no meaning without length_penalty"),
    ],
)
def test_mistakes(tmp_path, text, place, message):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    (line,) = str(refused.value).replace(f"{tmp_path}/", "").split("\n")
    assert line.startswith(f"ppo.yaml:{place}: "), line
    assert message in line


def test_a_config_of_a_run_is_read_again(tmp_path):
    """All fields stand in it, defaults too."""
    config = read(tmp_path, "reward: {source: 'count:a'}\n")
    (tmp_path / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    assert load(PpoConfig, tmp_path / "run.json", section="config") == config


@pytest.mark.parametrize("words", [["score", "rm", "rows.jsonl"], ["eval", "model", "--prompts=p", "--reward=rm"]])
def test_pairs_are_of_a_run_that_learns(words):
    """Nobody else looks at them: taken in silence, a file that is not there would go unnoticed."""
    with pytest.raises(ConfigError, match=r"--reward\.pairs: .*unknown flag"):
        parse(words[0], [*words[1:], "--output=o", "--reward.pairs=pairs.jsonl"])
    assert parse("ppo", ["--actor=a", "--data=d", "--output=o", "--reward=rm", "--reward.pairs=p"]).config.reward.pairs == "p"


@pytest.mark.parametrize("flag", ["max-forgetting", "reference", "against"])
def test_an_empty_value_turns_nothing_off(flag):
    words = ["model", "--data=d"]
    with pytest.raises(ConfigError, match=f"--{flag}: .*given nothing, expected .*, or none"):
        parse("eval", [*words, f"--{flag}", ""])
    assert getattr(parse("eval", [*words, f"--{flag}", "none"]).config, flag.replace("-", "_")) is None
