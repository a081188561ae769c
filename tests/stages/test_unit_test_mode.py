"""`rlhf ppo --unit-test` passes, and names the check that fails for each of ten faults planted into PPO."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from harness import fork, stage_module, wait
from torch import nn

from rlhf.config.parse import parse


def unit_test(log, change=None, learn=True) -> tuple[int, dict]:
    """(exit code, the JSON it prints)"""

    def body() -> None:
        module = stage_module("ppo")
        if change is not None:
            change(module)
        from rlhf.training.unit_test import unit_test as run

        run(parse("ppo", ["--unit-test"]).config, module.ppo, as_json=True, learn=learn)

    code = wait(fork(body, log=log))
    text = log.read_text()
    start = text.index('{\n  "passed"')
    return code, json.JSONDecoder().raw_decode(text[start:])[0]


@pytest.mark.slow  # test_docs.py runs it as README has it
def test_it_passes(tmp_path):
    code, result = unit_test(tmp_path / "log")
    assert result["passed"], [check for check in result["checks"] if not check["passed"]]
    assert code == 0
    names = {check["name"] for check in result["checks"]}
    assert {"first ratio", "KL at step 0", "pads", "micro-batches", "reward rises", "frozen reference"} <= names
    assert result["figures"]["tokens per second"] > 0


def positions_off_by_one(module) -> None:
    import rlhf.rollout.experience as experience

    right = experience.token_batch
    experience.token_batch = lambda rows: replace(batch := right(rows), position_ids=batch.position_ids + 1)


def temperature_missing_in_the_update(module) -> None:
    right = module.ppo_loss
    module.ppo_loss = lambda policy, *a, **k: right(lambda batch, temperature, entropy: policy(batch), *a, **k)


def score_one_index_late(module) -> None:
    import rlhf.rollout.credit as credit

    right = credit.token_rewards
    credit.token_rewards = lambda *a, **k: torch.roll(right(*a, **k), 1, dims=1)


def pads_unmasked(module) -> None:
    import rlhf.training.losses as losses

    right = losses.policy_loss
    losses.policy_loss = lambda new, old, adv, mask, *a, **k: right(new, old, adv, torch.ones_like(mask), *a, **k)


def mean_of_means(module) -> None:
    import rlhf.training.losses as losses

    right = losses.policy_loss

    def mean(new, old, adv, mask, *a, **k):
        loss, stats = right(new, old, adv, mask, *a, **k)
        return loss / mask.sum() * 100, stats

    losses.policy_loss = mean


def value_index_shifted(module) -> None:
    class Shifted(nn.Module):
        """The critic's values, each one position late."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *a, **k):
            output = self.inner(*a, **k)
            return output._replace(values=torch.roll(output.values, -1))

    import rlhf.training.collection as collection

    right = collection.score
    collection.score = lambda scored, places, policy, *more: right(scored, places, Shifted(policy), *more)


def dropout_on(module) -> None:
    right = module.open_ppo

    def with_dropout(config):
        roles = right(config)
        for part in roles.policy.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.1
        return roles

    module.open_ppo = with_dropout


def reference_trained(module) -> None:
    right = module.open_ppo

    def shared(config):
        roles = right(config)
        roles.reference.model = roles.policy
        return roles

    module.open_ppo = shared


def kl_sign(module) -> None:
    import rlhf.rollout.credit as credit

    right = credit.token_rewards
    credit.token_rewards = lambda scores, new, reference, mask, coef, *more: right(scores, new, reference, mask, -coef, *more)


def reward_negated(module) -> None:
    """In the maths and in the probe that looks at them, so that only learning can tell."""
    import rlhf.rollout.credit as credit
    import rlhf.training.probes as probes

    right = credit.shaped_scores
    credit.shaped_scores = probes.shaped_scores = lambda *a: -right(*a)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (positions_off_by_one, "plain log-probs"),
        (temperature_missing_in_the_update, "first ratio"),
        (score_one_index_late, "score placement"),
        (pads_unmasked, "pads"),
        (mean_of_means, "micro-batches"),
        (value_index_shifted, "plain values"),
        (dropout_on, "dropout"),
        (reference_trained, "frozen reference"),
        (kl_sign, "KL penalty"),
        pytest.param(reward_negated, "reward rises", marks=pytest.mark.slow),  # learns twice
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_named(fault, named, tmp_path):
    code, result = unit_test(tmp_path / "log", fault, learn=fault is reward_negated)
    assert code == 1
    assert not result["passed"]
    assert named in {check["name"] for check in result["checks"] if not check["passed"]}
