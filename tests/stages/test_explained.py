"""What runs write is what `rlhf explain` knows, and each self-check of a run is one line of its log."""

from __future__ import annotations

import re

import pytest
from broken import logprobs_shifted_by
from harness import flags, metrics, run

from rlhf.runs.explain import found

MORE = {
    "ppo": {"ppo__entropy_coef": 0.01, "ppo__importance_cap": 2, "kl__place": "loss", "kl__estimator": "k3"},
    "grpo": {},
}


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "kto", "ppo", "grpo"])
def test_every_metric_is_explained(stage, world, tmp_path):
    log = tmp_path / "log"
    short = {"schedule__length": 2, "checkpoint__every": 0, **MORE.get(stage, {})}
    assert run(stage, flags(stage, world, tmp_path / "run", **short), log) == 0, log.read_text()
    names = {name for line in metrics(tmp_path / "run") for name in line}
    assert {"step", "tokens", "optimizer/lr"} < names
    assert {name for name in names if (entry := found(name)) is None or entry.kind != "metric"} == set()
    if stage == "ppo":
        assert {"policy/full_entropy", "policy/importance_weight", "kl/loss"} < names
        checks = re.findall(r"ppo  check ok: ([^:]+):", log.read_text())
        first = ["rollout log-probs", "KL at step 0", "outside the mask", "whitening", "first ratio"]
        assert checks == [*first, "first values", "first clip fraction"]  # each once, though there are two iterations


def test_a_failed_check_is_told_with_its_causes(world, tmp_path):
    log = tmp_path / "log"
    assert run("ppo", flags("ppo", world, tmp_path / "run", schedule__length=1), log, logprobs_shifted_by(0.5)) == 1
    said, entry = log.read_text(), found("rollout log-probs")
    assert "check FAILED: rollout log-probs" in said
    assert entry is not None
    assert all(text in said for text in (entry.otherwise, *entry.causes, entry.do))
