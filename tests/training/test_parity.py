"""The check of an engine that starts: what it lets pass, and what it says of what it does not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from rlhf.config.parse import parse
from rlhf.errors import CheckFailed
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor
from rlhf.rollout.engines import Samples
from rlhf.rollout.hf_engine import HfEngine
from rlhf.rollout.sampling import Sampling
from rlhf.training.parity import require_parity
from rlhf.training.tiny import write_tiny_model

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 2, 3], [4], [9, 9]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, seed=0)
    return str(directory / "model")


def config(*flags: str, engine: str = "hf"):
    run = ["--actor=a", "--reward=count:a", "--data=d.jsonl", "--output=o", f"--rollout.engine={engine}"]
    return parse("ppo", [*run, *flags]).config


def check(policy, engine, *flags: str, named: str = "hf") -> list[str]:
    """What is noted of an engine that passes."""
    notes: list[str] = []
    run = SimpleNamespace(gathered=nullcontext, note=notes.append)
    require_parity(engine, policy, PROMPTS, config(*flags, engine=named), run)
    return notes


def engine_of(policy) -> HfEngine:
    engine = HfEngine(nullcontext, stop_ids=[1], pad_id=0, slots=8)
    engine.sync(policy, version=0)
    return engine


class Changed:
    """What another engine says, changed: `change(tokens, logprobs)` of each reply."""

    def __init__(self, engine, change) -> None:
        self.engine, self.change, self.asked = engine, change, []

    def generate(self, prompts, sampling, row_seeds) -> Samples:
        self.asked.append((list(prompts), sampling))
        found = self.engine.generate(prompts, sampling, row_seeds)
        for tokens, logprobs in zip(found.responses, found.logprobs, strict=True):
            self.change(tokens, logprobs)
        return found


def test_a_right_engine_passes(tiny):
    policy = ActorCritic(actor=load_actor(tiny, Loading()))
    seen = Changed(engine_of(policy), lambda tokens, logprobs: None)
    (note,) = check(policy, seen, "--rollout.max_new_tokens=7")
    assert "rollout engine hf: " in note
    assert " greedy tokens of 4 prompts are those of a forward, 0 near-ties aside; log-probs within " in note
    ((prompts, sampling),) = seen.asked
    assert (prompts, sampling.temperature, sampling.max_new_tokens) == (PROMPTS[:4], 0.0, 7)
    assert policy.training


def test_other_weights_are_found(tiny):
    policy, other = (ActorCritic(actor=load_actor(tiny, Loading())) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with pytest.raises(CheckFailed, match=r"engine hf does not sample the policy.* prompt \d, token \d: the engine took"):
        check(policy, engine_of(other))


def test_another_token_is_named_with_both_logprobs(tiny):
    policy = ActorCritic(actor=load_actor(tiny, Loading()))
    right = engine_of(policy).generate(PROMPTS[:4], Sampling(32, temperature=0.0), range(4))
    logits = policy.actor(torch.tensor([PROMPTS[0] + right.responses[0][:1]])).logits[0, -1].log_softmax(-1)
    best, least = int(logits.argmax()), int(logits.argmin())

    def change(tokens, logprobs) -> None:
        if tokens == right.responses[0]:
            tokens[1], logprobs[1] = least, float(logits[least])

    expected = (
        f"prompt 0, token 1: the engine took {least} with log-prob {logits[least]:.4f}; by a forward it has "
        f"{logits[least]:.4f}, and the likeliest is {best} with {logits[best]:.4f}"
    )
    with pytest.raises(CheckFailed) as caught:
        check(policy, Changed(engine_of(policy), change))
    assert expected in str(caught.value)


@pytest.mark.parametrize("wrong", [2e-4, -2e-4, float("nan")])
def test_a_logprob_that_is_off_is_found(tiny, wrong):
    policy = ActorCritic(actor=load_actor(tiny, Loading()))

    def change(tokens, logprobs) -> None:
        logprobs[-1] += wrong

    with pytest.raises(CheckFailed, match="does not sample"):
        check(policy, Changed(engine_of(policy), change))
    if wrong == wrong:
        check(policy, Changed(engine_of(policy), change), "--precision=bf16")  # 0.25 nats: as far as bf16 may be off


def test_near_ties_pass_and_are_counted(tiny):
    """A head of zeros: every token is as likely as any other."""
    policy = ActorCritic(actor=load_actor(tiny, Loading()))
    torch.nn.init.zeros_(policy.actor.get_output_embeddings().weight)

    def change(tokens, logprobs) -> None:
        tokens[0] = 5

    (note,) = check(policy, Changed(engine_of(policy), change), "--rollout.max_new_tokens=3")
    assert "12 greedy tokens of 4 prompts" in note
    assert ", 4 near-ties aside" in note


def test_the_native_engine_is_not_asked(tiny):
    policy = ActorCritic(actor=load_actor(tiny, Loading()))
    assert check(policy, None, named="native") == []
