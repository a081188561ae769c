"""Rollouts: the right tokens, whoever samples them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from splitmix import splitmix64
from transformers import AutoModelForCausalLM

from rlhf.errors import DataError
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor, load_tokenizer
from rlhf.rollout.engines import NativeEngine
from rlhf.rollout.readers import checked_scores
from rlhf.rollout.rewards import CountReward
from rlhf.rollout.sampling import Sampling, sample, uniform
from rlhf.training.tiny import write_tiny_model

PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 2, 3], [4], [2, 3, 4], [9, 9]]
SEEDS = [11, 22, 33, 44, 55, 66]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, seed=0)
    return directory


def engine(tiny, batch_size: int = 64) -> NativeEngine:
    made = NativeEngine(nullcontext, stop_ids=[1], pad_id=0, slots=batch_size)
    made.sync(ActorCritic(actor=load_actor(str(tiny / "model"), Loading())), version=7)
    return made


def test_greedy_is_generate(tiny):
    samples = engine(tiny).generate(PROMPTS, Sampling(12, temperature=0), SEEDS)
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    for prompt, response in zip(PROMPTS, samples.responses, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
        assert response == expected[0, len(prompt) :].tolist()
    assert samples.version == 7


def test_a_row_does_not_depend_on_its_company(tiny):
    sampling = Sampling(12, temperature=0.9)
    together = engine(tiny).generate(PROMPTS, sampling, SEEDS)
    in_twos = engine(tiny, batch_size=2).generate(PROMPTS, sampling, SEEDS)
    backwards = engine(tiny).generate(PROMPTS[::-1], sampling, SEEDS[::-1])
    alone = [engine(tiny).generate([p], sampling, [s]).responses[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together.responses == in_twos.responses == backwards.responses[::-1] == alone
    assert together.responses[0] != together.responses[4]  # equal prompts, other seeds
    assert len({len(response) for response in together.responses}) > 1
    for response, finished in zip(together.responses, together.finished, strict=True):
        assert finished == (response[-1] == 1)
        assert finished or len(response) == 12


def test_logprobs_are_the_models(tiny):
    samples = engine(tiny).generate(PROMPTS, Sampling(8, temperature=0.7, top_k=4), SEEDS)
    model = load_actor(str(tiny / "model"), Loading())
    for prompt, response, logprobs in zip(PROMPTS, samples.responses, samples.logprobs, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)


def test_splitmix64():
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    seeds = [0, 1, 12345, 2**62 + 17, 2**63 - 1]
    for place in (0, 1, 2, 1000):
        expected = [(splitmix64(seed, place) >> 11) * 2.0**-53 for seed in seeds]
        assert uniform(torch.tensor(seeds), place).tolist() == expected


def test_frequencies_are_the_softmax():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    count = 20000
    logits = probabilities.log().expand(count, 5)
    tokens, _ = sample(logits, Sampling(1), torch.arange(count) * 7919, 3)
    observed = torch.bincount(tokens, minlength=5).double()
    expected = probabilities.double() * count
    assert observed[4] == 0
    assert ((observed - expected)[:4] ** 2 / expected[:4]).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


def test_filters_leave_out_what_they_should():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(2000, 4)
    assert set(sample(logits, Sampling(1, top_k=2), torch.arange(2000), 0)[0].tolist()) == {0, 1}
    assert set(sample(logits, Sampling(1, top_p=0.7), torch.arange(2000), 0)[0].tolist()) == {0, 1}


def test_rewards_say_what_is_wrong(tiny):
    tokenizer = load_tokenizer(str(tiny / "model"))
    with pytest.raises(DataError, match="no single token"):
        CountReward("zebra", tokenizer)
    for bad, message in (([1.0], "1 values, expected a list of 2"), ([1.0, "2"], "reply 1 is '2'"), (3, "int, expected")):
        with pytest.raises(DataError, match=message):
            checked_scores(bad, 2, "mine.py:f")
