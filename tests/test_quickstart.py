"""`rlhf run quickstart`, whole, over three seeds: what README promises of it is what it does.

The bars are those the quickstart was designed to; the figures come from the exact scorer of the generated world on held-out
prompts, sampled at temperature 1.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    runs = {}
    for seed in SEEDS:
        output = tmp_path_factory.mktemp(f"seed-{seed}")
        command = [sys.executable, "-m", "rlhf", "run", "quickstart", "--seed", str(seed), "--output", str(output), "--json"]
        runs[seed] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    found = {}
    for seed, process in runs.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        found[seed] = json.loads(out)
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
