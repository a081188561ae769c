"""Our PPO update is TRL 1.12's, the last with PPO, on fixed rollouts where the conventions agree.

They agree for replies that reach the longest length: the score of one that ends is on its EOS here and one token later there
(docs/ppo.md). Advantages are whitened here as there, by the unbiased variance. Skips without TRL 1.12's environment, which
`make bench` makes.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config.policies import Kl, PpoAlgorithm
from rlhf.data.collate import last_row, token_batch
from rlhf.functional.advantages import gae
from rlhf.functional.ppo import value_loss
from rlhf.functional.rewards import token_rewards
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.models.roles import Reference
from rlhf.report.stats import Stats
from rlhf.rollout.engines import Samples
from rlhf.rollout.rewards import Scores
from rlhf.rollout.scoring import Scored, score
from rlhf.training.losses import actor_loss
from rlhf.training.tiny import write_tiny_model

PYTHON = Path(__file__).parents[1] / ".venv-trl-1.12" / "bin" / "python"
ROWS, PROMPT, REPLY = 6, 3, 5
KL, GAMMA, LAM, TEMPERATURE, LR = 0.05, 0.98, 0.9, 0.7, 3e-3
SETTINGS = {"kl_coef": KL, "gamma": GAMMA, "lam": LAM, "temperature": TEMPERATURE, "learning_rate": LR, "cliprange": 0.1,
            "cliprange_value": 0.05, "vf_coef": 0.3}  # fmt: skip


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-trl-1.12: `make bench` makes it")
def test_two_updates(tmp_path):
    write_tiny_model(tmp_path, seed=0)
    write_tiny_model(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model").rename(tmp_path / "reference")
    generator = torch.Generator().manual_seed(0)
    prompts, replies = (torch.randint(2, 10, (ROWS, length), generator=generator).tolist() for length in (PROMPT, REPLY))
    job = {"prompts": prompts, "replies": replies, "settings": SETTINGS}
    (tmp_path / "job.json").write_text(json.dumps(job))
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [str(PYTHON), str(Path(__file__).with_name("trl_ppo_update.py")), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env=alone, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "trl.safetensors")

    actor, critic = load_actor(str(tmp_path / "model"), Loading()), load_scalar(str(tmp_path / "critic"), Loading())
    policy = ActorCritic(actor=actor, critic=critic)
    reference = Reference(ActorCritic(actor=load_actor(str(tmp_path / "reference"), Loading())))
    rows = token_batch(last_row(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True))
    with torch.no_grad():
        scores = policy(rows, roles=("critic",)).values
    samples = Samples(prompts, replies, [[0.0] * REPLY] * ROWS, [False] * ROWS, 0)
    all_scored = Scores(scores, torch.ones(ROWS, dtype=torch.bool), {})
    everything = [(range(ROWS), 1.0)]
    experience = score(Scored(samples, all_scored), everything, policy, True, reference, TEMPERATURE, 0)
    mask, values = experience.mask, experience.values
    rewards = token_rewards(scores, experience.logprobs, experience.reference_logprobs, mask, KL)
    advantages, returns = gae(rewards, values, mask, GAMMA, LAM)
    white = (advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
    part = replace(experience, advantages=white, returns=returns).weighed(range(ROWS), "tokens", REPLY)
    update = PpoAlgorithm(clip=SETTINGS["cliprange"], value_clip=SETTINGS["cliprange_value"], value_coef=SETTINGS["vf_coef"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    for number in range(2):
        output = policy(part.batch(), temperature=TEMPERATURE)
        states = part.spread(output.values), part.values, part.returns, mask
        loss = actor_loss(output, part, update, Kl(), KL, Stats())
        loss = loss + update.value_coef * value_loss(*states, update.value_clip, part.weights)[0]
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(theirs[f"{number}.loss"].item(), abs=1e-5)
        ours = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        assert {f"{number}.{name}" for name in ours} == {n for n in theirs if n.startswith(f"{number}.")} - {f"{number}.loss"}
        for name, gradient in ours.items():
            assert torch.allclose(gradient, theirs[f"{number}.{name}"], atol=1e-5), (number, name)
        optimizer.step()
