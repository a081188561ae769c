"""`rlhf run quickstart`, whole, over three seeds: what README promises of it is what it does.

The bars are those the quickstart was designed to; the figures come from the exact scorer of the generated world on held-out
prompts, sampled at temperature 1.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.chat_world import judge
from rlhf.models.load import Loading, load_actor, load_scalar

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    runs, outputs = {}, {}
    for seed in SEEDS:
        outputs[seed] = output = tmp_path_factory.mktemp(f"seed-{seed}")
        command = [sys.executable, "-m", "rlhf", "run", "quickstart", "--seed", str(seed), "--output", str(output), "--json"]
        runs[seed] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = {}
    for seed, process in runs.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        found[seed] = json.loads(out) | {"output": outputs[seed]}
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_policy_becomes_helpful(figures, seed):
    before, after, reward_model = (figures[seed][name] for name in ("before", "after", "reward_model"))
    print(json.dumps({"seed": seed, "before": before, "after": after, "reward_model": reward_model}))
    assert before["helpful"] <= 0.25
    assert after["helpful"] >= 0.70
    assert after["polite"] >= 0.90
    assert after["gold"] - before["gold"] >= 1.2
    assert after["grammatical"] >= 0.88
    assert after["kl"] < 6
    assert reward_model["accuracy"] >= 0.88


def command(*words: object) -> None:
    run = subprocess.run([sys.executable, "-m", "rlhf", *map(str, words)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_on_the_pairs_is_better_than_sft(seed, figures, tmp_path):
    """Half of its pass over the pairs; the replies to the held-out prompts are judged as those of SFT and PPO are."""
    start, run, replies = figures[seed]["output"], tmp_path / "dpo", tmp_path / "replies.jsonl"
    data = {"data": start / "world/pairs.jsonl", "data.eval": start / "world/pairs_heldout.jsonl"}
    flags = {"model": start / "sft", "output": run, "seed": seed, "schedule.unit": "steps", "schedule.length": 90, **data}
    command("dpo", "--config", "quickstart/dpo", *(f"--{name}={value}" for name, value in flags.items()))
    words = "--data", start / "world/prompts_heldout.jsonl", "--output", replies, "--max_new_tokens", 32, "--temperature", 1
    command("generate", run, *words)
    rows = [json.loads(line) for line in replies.read_text().splitlines()]
    scores = judge([row["prompt"] for row in rows], [row["response"] for row in rows])["gold"]
    result = json.loads((run / "run.json").read_text())["result"]
    before, after = figures[seed]["before"]["gold"], sum(scores) / len(scores)
    print(json.dumps({"seed": seed, "gold": [before, after], "accuracy": result["eval/accuracy"]}))
    assert after - before >= 0.3
    assert result["eval/accuracy_low"] > 0.8


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["block", "delayed"])
def test_ppo_in_fp8_reaches_the_same_bars(recipe, figures, tmp_path):
    """From the SFT and reward model of seed 0; the self-checks of the first iteration hold, ratio exactly 1 among them."""
    start, run = figures[0]["output"], tmp_path / recipe
    data = {"data": start / "world/prompts.jsonl", "data.eval": start / "world/prompts_heldout.jsonl"}
    flags = {"actor": start / "sft", "reward": start / "rm", "output": run, "fp8.recipe": recipe, **data}
    command("ppo", "--config", "quickstart/ppo", *(f"--{name}={value}" for name, value in flags.items()))
    result = json.loads((run / "run.json").read_text())["result"]
    print(json.dumps({"recipe": recipe, **result}))
    assert result["after"]["gold"] - result["before"]["gold"] >= 1.2
    assert result["after"]["helpful"] >= 0.70
    assert result["after"]["kl"] < 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_quickstart_with_fp8_and_lora(processes, tmp_path):
    """A few steps of each stage; what is left is what plain transformers loads, to the same logits."""
    lengths = {"sft": 30, "rm": 20, "ppo": 3}
    settings = {"fp8.recipe": "block", "lora.rank": 8, "lora.merge": "true"}
    words = [f"--{stage}.{name}={value}" for stage in lengths for name, value in settings.items()]
    words += [f"--{stage}.schedule.length={length}" for stage, length in lengths.items()]
    command("run", "quickstart", "--output", tmp_path, "--nproc", processes, "--ppo.data.eval_limit=16", *words)
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    for place in ("sft/model", "ppo/model"):
        theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / place), load_actor(str(tmp_path / place), Loading())
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
    for place in ("rm/model", "ppo/critic"):
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / place)
        assert torch.equal(theirs(ids).logits, load_scalar(str(tmp_path / place), Loading())(ids).logits)
