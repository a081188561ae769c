"""A mistake in a config is found, at its place, with its fix; what is right is read as the field's type says.

The expected places are counted by hand in the texts below.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from rlhf import paths
from rlhf.config import find_config, load, to_json, tree
from rlhf.config.schema import STAGES, PpoConfig, SftConfig
from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError

GOOD = """\
output: runs/ppo
roles: {actor: sft}
data: {train: prompts.jsonl}
reward: {source: rm}
"""
"""The required fields of a PPO run, in four lines; the cases below go on at line 5."""


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


BAD_VALUES = [
    # booleans are true and false, nothing else
    ("lora:\n  merge: yes\n", "6:10: lora.merge", "given `yes`, expected true or false; write `true`"),
    ("lora: {merge: no}\n", "5:15: lora.merge", "write `false`"),
    ("lora: {merge: True}\n", "5:15: lora.merge", "write `true`"),
    ("lora: {merge: 1}\n", "5:15: lora.merge", "write `true`"),
    ("lora: {merge: maybe}\n", "5:15: lora.merge", "leave it out for the default false"),
    # whole numbers are written whole
    ("seed: 1.0\n", "5:7: seed", "given `1.0`, expected a whole number, at least 0"),
    ("seed: 1.0\n", "5:7: seed", "write `1`"),
    ("micro_batch_size: 1e3\n", "5:19: micro_batch_size", "write `1000`"),
    ("micro_batch_size: 0.5\n", "5:19: micro_batch_size", "leave it out for the default 8"),
    ("micro_batch_size: 0\n", "5:19: micro_batch_size", "expected a whole number, at least 1"),
    ("micro_batch_size: " + "9" * 5000 + "\n", "5:19: micro_batch_size", "expected a whole number"),
    ("seed: -1\n", "5:7: seed", "given `-1`, expected a whole number, at least 0"),
    ("seed: 9223372036854775808\n", "5:7: seed", "below 9223372036854775808"),
    ("threads: many\n", "5:10: threads", "given `many`"),
    # numbers and their ranges
    ("ppo:\n  epochs: 2\n  clip: abc\n", "7:9: ppo.clip", "given `abc`, expected a number, above 0"),
    ("ppo: {clip: -0.2}\n", "5:13: ppo.clip", "leave it out for the default 0.2"),
    ("ppo: {gamma: 1.5}\n", "5:14: ppo.gamma", "expected a number, from 0 to 1"),
    ("ppo: {clip: nan}\n", "5:13: ppo.clip", "given `nan`"),
    ("ppo: {value_clip: inf}\n", "5:19: ppo.value_clip", "expected a number, above 0, or none"),
    ("max_hours: 3h\n", "5:12: max_hours", "given `3h`"),
    ("lora: {dropout: 1}\n", "5:17: lora.dropout", "at least 0 and below 1"),
    ("kl: {coef: [0.1]}\n", "5:12: kl.coef", "given a list"),
    ("kl: {coef: {start: 0.1}}\n", "5:6: kl.coef", "given a section of fields"),
    # choices
    ("precision: fp16\n", "5:12: precision", "expected `fp64`, `fp32` or `bf16`; leave it out for the default fp32"),
    ("precision: Fp32\n", "5:12: precision", "did you mean `fp32`?"),
    ("schedule: {unit: tokens}\n", "5:18: schedule.unit", "expected `steps` or `epochs`"),
    # no value where one is needed
    ("seed:\n", "5:6: seed", "given nothing"),
    ("seed: null\n", "5:7: seed", "given `null`"),
    ("ppo: {clip: ~}\n", "5:13: ppo.clip", "given `~`"),
    ("lora: {targets: none}\nseed: none\n", "6:7: seed", "given `none`"),
    ("precision: null\n", "5:12: precision", "given `null`"),
    # shapes
    ("ppo:\n", "5:5: ppo", "given nothing, expected the fields of a section (epochs,"),
    ("ppo:\n# epochs: 2\nseed: 0\n", "5:5: ppo", "leave it out for the defaults"),
    ("kl: 0.1\n", "5:5: kl", "given `0.1`, expected the fields of a section"),
    ("kl: [coef]\n", "5:5: kl", "given a list"),
    ("eval: {scorers: file.py:score}\n", "5:17: eval.scorers", "expected a list of text; write `[file.py:score]`"),
    ("report: {trackers: [tensorboard, wandb]}\n", "5:34: report.trackers[1]", "expected `tensorboard`"),
    ("report:\n  trackers:\n    - Tensorboard\n", "7:7: report.trackers[0]", "did you mean `tensorboard`?"),
    # what YAML offers and a config does not
    ("lora: &a {rank: 4}\n", "5:7: lora", "anchor `&a`"),
    ("lora: &a {rank: 4}\nkl: *a\n", "6:5: kl", "alias `*a`: write the value itself"),
    ("seed: !!int 3\n", "5:7: seed", "tag `tag:yaml.org,2002:int`"),
    ("seed: !!python/object/apply:os.getpid []\n", "5:7: seed", "python/object/apply:os.getpid`: leave it out"),
    ("seed: 1\nthreads: 1\nseed: 2\n", "7:1: seed", "given twice, first at ppo.yaml:5:1; keep one"),
    ("kl: {coef: 1, coef: 2}\n", "5:15: kl.coef", "given twice"),
    ("? [a, b]\n: 1\n", "5:3", "a field's name is plain text, not a list"),
    ("---\nseed: 1\n", "5:1", "a second document"),
    # unknown fields
    ("kl: {coeff: 1}\n", "5:6: kl.coeff", "unknown field; did you mean `kl.coef`?"),
    ("rolout:\n  batch_size: 2\n", "5:1: rolout", "did you mean `rollout`?"),
    ("gamma: 1\n", "5:1: gamma", "did you mean `ppo.gamma`?"),
    ("batch_size: 4\n", "5:1: batch_size", "did you mean `micro_batch_size` or `rollout.batch_size`?"),
    ("ppo: {temperature: 1}\n", "5:7: ppo.temperature", "did you mean `rollout.temperature` or `eval.temperature`?"),
    ("model: {path: gpt}\n", "5:1: model", "it belongs to sft and rm"),
    ("kl.coef: 0.1\n", "5:1: kl.coef", "sections nest: write `coef:` under `kl:`"),
    ("kl: {xyzzy: 1}\n", "5:6: kl.xyzzy", "known here: coef, estimator, controller, target, horizon"),
    # fields that do not go together, at the field the schema's message names first, else at their section
    ("ppo:\n  minibatch_size: 65\n", "6:19", "ppo.minibatch_size 65 is more than the 64 replies"),
    ("ppo:\n  minibatch_size: 24\n", "6:19", "24 does not divide the 64 replies of an iteration"),
    ("rollout: {batch_size: 8}\n", "1:1", "ppo.minibatch_size 64 is more than the 8 replies"),
    ("lora: {rank: 8, dropout: 0.1}\n", "5:26", "lora.dropout must be 0"),
    ("lora: {rank: 8}\nfrozen_layers: 1\n", "6:16", "frozen_layers must be 0 with lora.rank > 0"),
    ("lora: {dora: true}\n", "5:14", "lora.dora has no meaning with lora.rank 0"),
    ("lora: {base: nf4}\n", "5:14", "lora.base has no meaning with lora.rank 0"),
    ("lora: {rank: 8, base: nf4}\nfp8: {recipe: block}\n", "6:15", "fp8.recipe must be `none` with lora.base `nf4`"),
]


@pytest.mark.parametrize(("text", "place", "message"), BAD_VALUES)
def test_a_mistake_in_the_file(tmp_path: Path, text: str, place: str, message: str) -> None:
    lines = mistakes(tmp_path, GOOD + text)
    assert any(line.startswith(f"ppo.yaml:{place}: ") and message in line for line in lines), lines


BAD_FLAGS = [
    (("ppo.clip", "abc"), "--ppo.clip: given `abc`, expected a number, above 0; leave it out for the default 0.2"),
    (("ppo.value-clip", "-1"), "--ppo.value-clip: ppo.value_clip: given `-1`, expected a number, above 0, or none"),
    (("ppo.whiten", "yes"), "--ppo.whiten: given `yes`, expected true or false; write `true`"),
    (("seed", "1.0"), "--seed: given `1.0`, expected a whole number"),
    (("output", "null"), "--output: given `null`, expected text"),
    (("output", ""), "--output: given nothing, expected text"),
    (("actor", ""), "--actor: roles.actor: given nothing, expected text"),
    (("report.trackers", "tensorboard,wandb"), "--report.trackers: report.trackers[1]: given `wandb`"),
    (("data.columns.prompt", "null"), "--data.columns.prompt: given `null`, expected text"),
    (("data.columns", "a"), "--data.columns: names a section; give one of its fields: --data.columns.NAME"),
    (("ppo", "1"), "--ppo: names a section; give one of its fields: --ppo.epochs, --ppo.minibatch_size"),
    (("ppo.clip.low", "1"), "--ppo.clip.low: unknown flag; did you mean `--ppo.clip`?"),
    (("ppo.clpi", "1"), "--ppo.clpi: unknown flag; did you mean `--ppo.clip`?"),
    (("rolout.batch-size", "1"), "--rolout.batch-size: unknown flag; did you mean `--rollout.batch_size`?"),
    (("clip", "1"), "--clip: unknown flag; did you mean `--reward.clip` or `--ppo.clip`?"),
    (("model", "gpt"), "--model: unknown flag; it belongs to sft and rm"),
    (("xyzzy", "1"), "--xyzzy: unknown flag; --help lists them all"),
    (("ppo.minibatch_size", "100"), "--ppo.minibatch_size: ppo.minibatch_size 100 is more than the 64 replies"),
]


@pytest.mark.parametrize(("flag", "message"), BAD_FLAGS)
def test_a_mistake_in_a_flag(tmp_path: Path, flag: tuple[str, str], message: str) -> None:
    lines = mistakes(tmp_path, GOOD, flag)
    assert len(lines) == 1
    assert lines[0].startswith(message)


UNREADABLE = [
    (b"", "1:1: expected `field: value` lines, found nothing"),
    (b"# only words\n", "2:1: expected `field: value` lines, found nothing"),
    (b"---\n", "found nothing"),
    (b"- output: x\n", "1:1: expected `field: value` lines, found a list"),
    (b"ppo\n", "1:1: expected `field: value` lines, found `ppo`"),
    (b"output: a: b\n", "1:10: not YAML: mapping values are not allowed"),
    (b"kl:\n\tcoef: 1\n", "2:1: not YAML: found character that cannot start any token; indent with spaces"),
    (b"kl: {coef: 1\nseed: 1\n", "not YAML"),
    (b"output: \x07\n", "1:9: not a text file: it holds the control character U+0007"),
    (b"seed: 1\noutput: \xff\n", "2:9: not UTF-8 text"),
    (b"kl: " + b"[" * 900 + b"]" * 900, "1:21: nested more than 16 deep"),
]


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
    if stage == "ppo":
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
