"""The JSON Schema that editors get: it accepts the shipped configs, and finds what our own reader would refuse."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from rlhf.cli import main
from rlhf.paths import CONFIGS

SHIPPED = [
    file
    for file in sorted(CONFIGS.rglob("*.yaml"))
    if file.stem in ("sft", "rm", "dpo", "kto", "ppo", "grpo") and "launch" not in file.parts
]


def schema(stage: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["schema", stage]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_configs_are_valid(file, capsys):
    found = schema(file.stem, capsys)
    jsonschema.Draft202012Validator.check_schema(found)
    jsonschema.validate(yaml.safe_load(file.read_text()), found)


@pytest.mark.parametrize(
    ("wrong", "at"),
    [
        ({"ppo": {"epoch": 4}}, "ppo"),
        ({"ppo": {"epochs": "four"}}, "ppo/epochs"),
        ({"kl": {"estimator": "k9"}}, "kl/estimator"),
        ({"rollout": {"temperature": -1}}, "rollout/temperature"),
    ],
)
def test_mistakes_are_found_where_they_are(wrong, at, capsys):
    (mistake,) = jsonschema.Draft202012Validator(schema("ppo", capsys)).iter_errors(wrong)
    assert "/".join(map(str, mistake.absolute_path)) == at


def test_what_a_flag_may_give_is_not_required(capsys):
    jsonschema.validate({}, schema("ppo", capsys))
