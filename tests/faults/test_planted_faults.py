"""Ten faults a user makes with a pipeline, each planted and each named before PPO, or within its first iterations.

Those that have a test of their own elsewhere are listed with it, the others are here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from harness import flags, run
from transformers import AutoTokenizer

TESTS = Path(__file__).resolve().parents[1]

ELSEWHERE = {
    "pad=EOS (which here changes nothing)": ("faults/test_tokenizers.py", "test_pad_may_be_eos"),
    "RM from another tokenizer": ("faults/test_tokenizers.py", "test_a_reward_model_that_reads_other_words_is_given_text"),
    "head dropped": ("models/test_load_save.py", "test_e4_a_missing_head_is_an_error_naming_the_tensor"),
    "temperature mismatch": ("stages/test_unit_test_mode.py", "temperature_missing_in_the_update"),
    "truncated prompts": ("faults/test_bad_data.py", "test_what_is_too_long_is_an_error_or_counted"),
    "shuffled labels": ("stages/test_reward_models.py", "test_ppo_wants_a_reward_model_that_is_better_than_a_coin"),
}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_it_has_a_test(fault):
    file, name = ELSEWHERE[fault]
    assert name in (TESTS / file).read_text()


def test_another_template_is_named(llamas, tmp_path):
    """The critic was trained on other marks between the turns than the actor writes."""
    critic, log = Path(shutil.copytree(llamas / "critic", tmp_path / "critic")), tmp_path / "log"
    tokenizer = AutoTokenizer.from_pretrained(critic)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(critic)
    assert run("ppo", flags("ppo", llamas, tmp_path / "ppo", critic=critic), log) == 65
    assert "the template of the critic" in log.read_text()


def test_exchanged_labels_are_told_from_a_coin(world, tmp_path):
    """Rewards negated: what was chosen when it was trained is rejected where it is evaluated."""
    log, rm = tmp_path / "log", tmp_path / "rm"
    pairs = [{"prompt": "a b", "chosen": f" c {letter}", "rejected": f" d {letter}"} for letter in "abcdefgh"] * 4
    exchanged = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    files = {"data": write(tmp_path / "pairs.jsonl", pairs), "data__eval": write(tmp_path / "exchanged.jsonl", exchanged)}
    learning = {"schedule__length": 40, "optimizer__lr": 1e-2, "checkpoint__every": 0}
    assert run("rm", flags("rm", world, rm, **files, **learning), log) == 0, log.read_text()
    assert json.loads((rm / "run.json").read_text())["result"]["eval/accuracy_high"] < 0.5
    ppo = {"schedule__length": 1, "data__eval": "null", "critic": "zero"}
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", reward=rm, **ppo), log) == 1
    assert f"reward.source {rm}: prefers the worse replies" in log.read_text()
    assert "`chosen` and `rejected` are exchanged" in log.read_text()


def test_a_rising_learning_rate_is_no_config(world, tmp_path):
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", schedule__final=5), log) == 78
    assert "schedule.final" in log.read_text()


@pytest.mark.parametrize(("coefficient", "told"), [(0, True), (0.05, False)])
def test_no_kl_penalty_is_said(coefficient, told, world, tmp_path):
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", world, tmp_path / "ppo", kl__coef=coefficient, schedule__length=1), log) == 0, (
        log.read_text()
    )
    assert ("warning: kl.coef is 0" in log.read_text()) is told
