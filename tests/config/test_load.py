"""A mistake in a config is found, at its place, with its fix; what is right is read as the field's type says.

The expected places are counted by hand in the texts below.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from bad_configs import BAD_FLAGS, BAD_VALUES, GOOD, UNREADABLE
from pydantic import ValidationError

from rlhf import paths
from rlhf.config import tree
from rlhf.config.load import find_config, load, to_json
from rlhf.config.schema import STAGES, PpoConfig, SftConfig
from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError


def ppo(tmp_path: Path, text: str, *flags: tuple[str, str]) -> PpoConfig:
    file = tmp_path / "ppo.yaml"
    file.write_text(text, encoding="utf-8")
    return load(PpoConfig, file, flags)


def mistakes(tmp_path: Path, text: str, *flags: tuple[str, str]) -> list[str]:
    """The lines of the error, with the directory left out."""
    with pytest.raises(ConfigError) as error:
        ppo(tmp_path, text, *flags)
    assert error.value.exit_code == 78
    return str(error.value).replace(f"{tmp_path}/", "").split("\n")


@pytest.mark.parametrize(("text", "place", "message"), BAD_VALUES)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, place: str, message: str) -> None:
    lines = mistakes(tmp_path, GOOD + text)
    assert any(line.startswith(f"ppo.yaml:{place}: ") and message in line for line in lines), lines


@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS)
def test_a_mistake_in_a_flag(tmp_path: Path, flag: tuple[str, str], message: str) -> None:
    lines = mistakes(tmp_path, GOOD, flag)
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize(("content", "message"), UNREADABLE)
def test_a_file_that_cannot_be_read_past_its_mistake(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(PpoConfig, file)
    assert str(error.value).startswith(f"{file}:")
    assert message in str(error.value)


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_places(tmp_path: Path) -> None:
    text = """\
roles:
  critc: zero
  mode: shard
output: runs/ppo
data: {train: a, train: b, max_length: 0}
ppo: {clip: wide}
kl: &kl {coef: 0.1}
"""
    lines = mistakes(tmp_path, text, ("seed", "x"), ("ppo.epoch", "3"))
    assert [line.split(" ")[0] for line in lines] == [
        "ppo.yaml:1:1:",
        "ppo.yaml:1:1:",
        "ppo.yaml:2:3:",
        "ppo.yaml:3:9:",
        "ppo.yaml:5:18:",
        "ppo.yaml:5:40:",
        "ppo.yaml:6:13:",
        "ppo.yaml:7:5:",
        "--seed:",
        "--ppo.epoch:",
    ]
    assert lines[0].startswith("ppo.yaml:1:1: roles.actor: missing (")
    assert lines[1].startswith("ppo.yaml:1:1: reward.source: missing (")


def test_one_cause_is_reported_once(tmp_path: Path) -> None:
    assert len(mistakes(tmp_path, GOOD + "max_hours: &a 1\nseed: *a\n")) == 2


def test_a_missing_field_names_its_section_and_its_flag(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "output: x\ndata: {train: a}\nreward: {source: rm}\nroles:\n  mode: shared\n")
    assert lines == [
        "ppo.yaml:4:1: roles.actor: missing (The policy to improve: any model source, usually the SFT run); "
        "add it here or give --actor"
    ]
    with pytest.raises(ConfigError) as error:
        load(SftConfig, None, [("data.max_length", "8")])
    lines = str(error.value).split("\n")
    assert [line.partition(" (")[0] for line in lines] == [
        "command line: output: missing",
        "command line: model.path: missing",
        "command line: data.train: missing",
    ]
    assert [line.rpartition("; ")[2] for line in lines] == ["give --output", "give --model", "give --data"]


@pytest.mark.parametrize("flags", [("roles.actor", "actor"), ("roles.actor", "roles.actor"), ("data", "data.train")])
def test_a_field_given_by_two_flags_is_refused(tmp_path: Path, flags: tuple[str, str]) -> None:
    (line,) = mistakes(tmp_path, GOOD, (flags[0], "a"), (flags[1], "b"))
    assert line.startswith(f"--{flags[1]}: ")
    assert f"given twice, first as --{flags[0]}; keep one" in line


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    bomb = "".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 40))
    lines = mistakes(tmp_path, GOOD + "a0: &a0 x\n" + bomb)
    assert any("alias `*a38`" in line for line in lines)


def test_the_parser_written_in_python_gives_the_same_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GOOD + "kl: {coeff: 'a', coef: x}\nlora:\n  rank: *a\n  merge:\nseed: !t 1\n"
    with_libyaml = mistakes(tmp_path, text)
    monkeypatch.setattr(tree, "LOADER", yaml.SafeLoader)
    assert mistakes(tmp_path, text) == with_libyaml


def test_the_type_decides_how_a_text_is_read(tmp_path: Path) -> None:
    text = """\
output: no
roles: {actor: 1e5, reference: null, critic: none}
data:
  train: 2024-01-01
  eval: "null"
  columns: {yes: on, prompt: 007}
reward: {source: 'count:!', clip: ~, missing_eos: none}
optimizer: {lr: 1e-5, critic_lr: 3}
lora: {merge: true, targets: null-ish}
max_hours:
ppo: {epochs: "2", value_clip: none}
eval: {scorers: [a.py:f, "b:g"]}
"""
    config = ppo(tmp_path, text)
    assert config.output == "no"
    assert (config.roles.actor, config.roles.reference, config.roles.critic) == ("1e5", None, None)
    assert (config.data.train, config.data.eval) == ("2024-01-01", "null")
    assert config.data.columns == {"yes": "on", "prompt": "007"}
    assert (config.reward.clip, config.reward.missing_eos) == (None, "none")
    assert (config.optimizer.lr, config.optimizer.critic_lr) == (1e-5, 3.0)
    assert (config.lora.merge, config.lora.targets, config.max_hours) == (True, "null-ish", None)
    assert (config.ppo.epochs, config.ppo.value_clip) == (2, None)
    assert config.eval.scorers == ("a.py:f", "b:g")


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    text = GOOD + "ppo: {clip: 0.1, epochs: 3}\neval: {scorers: [a:b]}\n"
    flags = [
        ("ppo.clip", "0.3"),
        ("kl.coef", "1e-3"),
        ("actor", "runs/sft"),
        ("eval.scorers", "c:d, e:f"),
        ("data.columns.prompt-text", "question"),
        ("rollout.max-new-tokens", "16"),
        ("ppo.value_clip", "none"),
        ("ppo.whiten", "false"),
        ("report.trackers", ""),
    ]
    config = ppo(tmp_path, text, *flags)
    assert (config.ppo.clip, config.ppo.epochs, config.kl.coef) == (0.3, 3, 0.001)
    assert (config.roles.actor, config.eval.scorers) == ("runs/sft", ("c:d", "e:f"))
    assert config.data.columns == {"prompt-text": "question"}
    assert (config.rollout.max_new_tokens, config.ppo.value_clip, config.ppo.whiten) == (16, None, False)
    assert config.report.trackers == ()


def test_a_flag_puts_the_files_mistake_right(tmp_path: Path) -> None:
    assert ppo(tmp_path, GOOD + "ppo: {clip: wide}\n", ("ppo.clip", "0.3")).ppo.clip == 0.3


def test_a_flag_into_a_section_the_file_got_wrong(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, GOOD + "ppo: 3\n", ("ppo.clip", "0.3"))
    assert line.startswith("ppo.yaml:5:6: ppo: given `3`")


def test_json_is_read_with_places(tmp_path: Path) -> None:
    file = tmp_path / "sft.json"
    good = {"output": "runs/sft", "model": {"path": "m"}, "data": {"train": "t", "eval": None, "packing": True}}
    file.write_text(json.dumps(good), encoding="utf-8")
    config = load(SftConfig, file)
    assert (config.data.eval, config.data.packing) == (None, True)
    file.write_text(json.dumps(good | {"batch_size": 2.5}, indent=2), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sft\.json:11:17: batch_size: given `2\.5`"):
        load(SftConfig, file)


AWKWARD = [
    "no",
    "null",
    "~",
    "",
    "1e5",
    "a: b # c",
    'quo"te\\',
    "ünï ☃ 🙂",
    "two\nlines\tand a tab",
    "{x}",
    "- y",
    " z ",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_the_resolved_config_reads_back_equal(tmp_path: Path, text: str) -> None:
    model, data = {"path": text}, {"train": text, "eval": text, "columns": {text: text}}
    config = SftConfig.model_validate({"output": text, "model": model, "data": data, "max_hours": 1e-7, "seed": 2**62})
    file = tmp_path / "resolved.json"
    file.write_text(to_json(config), encoding="utf-8")
    assert load(SftConfig, file) == config
    assert json.loads(to_json(config)) == config.model_dump(mode="json")
    assert to_json(load(SftConfig, file)) == to_json(config)


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_of_every_stage_read_back_equal(tmp_path: Path, stage: str) -> None:
    required = {"output": "o", "model": {"path": "m"}, "data": {"train": "t"}}
    if stage in ("ppo", "grpo"):
        required = {"output": "o", "roles": {"actor": "a"}, "data": {"train": "t"}, "reward": {"source": "r"}}
    config = STAGES[stage].model_validate(required)
    file = tmp_path / "resolved.json"
    file.write_text(to_json(config), encoding="utf-8")
    assert load(STAGES[stage], file) == config


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ppo", "sft", "quickstart/ppo", "launch/cpu"):
        file = tmp_path / "configs" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(paths, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs"


def test_a_config_is_found_by_name_or_by_file(configs: Path) -> None:
    (configs.parent / "ppo").write_text("a file of the user's, not the shipped config", encoding="utf-8")
    assert find_config("ppo") == configs / "ppo.yaml"
    assert find_config("quickstart/ppo") == configs / "quickstart" / "ppo.yaml"
    assert find_config("configs/sft.yaml") == Path("configs/sft.yaml")


def test_a_config_that_is_not_there_names_the_nearest(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"^ppp: no such config; did you mean `ppo`"):
        find_config("ppp")
    with pytest.raises(ConfigError, match=r"did you mean `configs/sft.yaml`"):
        find_config("configs/stf.yaml")
    with pytest.raises(ConfigError, match=r"one of ppo, quickstart/ppo, sft, or a file that ends in `.yaml`, `.yml`"):
        find_config("xyzzy")
    with pytest.raises(ConfigError, match=r"configs/sfft.yaml: no such config; did you mean"):
        load(SftConfig, Path("configs/sfft.yaml"))


def test_a_directory_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(SftConfig, tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"recipe": "block", "margin": 1}, "margin has no meaning with recipe block, only with delayed, current"),
        ({"recipe": "current", "amax_history": 7}, "amax_history has no meaning with recipe current, only with delayed"),
        ({"recipe": "rowwise", "block_scales": "fp32"}, "block_scales has no meaning with recipe rowwise, only with block"),
    ],
)
def test_what_an_fp8_recipe_does_not_have_is_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        Fp8(**settings)
    Fp8(**{**settings, "recipe": "none"})  # FP8 off, whatever it was before


def test_what_would_hold_without_the_flag_is_what_the_file_says(tmp_path: Path) -> None:
    flag, said = ("optimizer.lr", "-1e-4"), "--optimizer.lr: given `-1e-4`, expected a number, above 0; leave it out for "
    file = "output: x\noptimizer:\n  lr: 3e-4\nroles: {actor: a}\nreward: {source: r}\ndata: {train: t}\n"
    assert mistakes(tmp_path, file, flag) == [f"{said}`3e-4`, as ppo.yaml:3:7 has it"]
    without = file.replace("lr: 3e-4", "max_grad_norm: 1")
    assert mistakes(tmp_path, without, flag) == [f"{said}the default 1e-06"]
