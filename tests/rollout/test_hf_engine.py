"""transformers' `generate` with our draws: the tokens of the definition, whoever is beside a row."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import test_refill
import torch
from splitmix import splitmix64
from test_refill import FAMILIES, PROMPTS, SAMPLING, SEEDS, STOP, WITH_STATES, alone, expected, model_of, sampled
from torch import nn

from rlhf.models.actor_critic import ActorCritic
from rlhf.rollout.engines import Samples
from rlhf.rollout.hf_engine import HfEngine
from rlhf.rollout.sampling import Sampling


def by_generate(model: nn.Module, slots: int, prompts=PROMPTS, sampling=SAMPLING, seeds=SEEDS, stop=STOP) -> Samples:
    engine = HfEngine(nullcontext, sorted(stop), pad_id=0, slots=slots)
    engine.sync(ActorCritic(actor=model), version=3)
    return engine.generate(prompts, sampling, seeds)


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_STATES])
def test_every_family_samples_as_if_alone(family):
    """In float32: with pads at the left, transformers' eager attention is NaN in float64."""
    model = model_of(family)
    right = expected(model)
    assert len({len(reply) for reply in right}) > 2
    model = model.float()
    for slots in (1, 3, 7):
        samples = by_generate(model, slots)
        assert samples.responses == right
        assert samples.prompts == PROMPTS
        assert samples.finished == [reply[-1] in STOP for reply in right]
        assert samples.version == 3


def test_logprobs_are_those_of_the_full_softmax():
    model = model_of("llama")
    samples = by_generate(model, 3, sampling=Sampling(9, temperature=0.8, top_k=3, top_p=0.9))
    for prompt, response, logprobs in zip(PROMPTS, samples.responses, samples.logprobs, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.8
        right = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        assert len(logprobs) == len(response)
        assert torch.allclose(torch.tensor(logprobs).double(), right, atol=1e-5)


def test_greedy_is_generates_own():
    model = model_of("gpt-neox")
    samples = by_generate(model, 7, sampling=Sampling(9, temperature=0.0))
    for prompt, response in zip(PROMPTS, samples.responses, strict=True):
        own = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=9, eos_token_id=sorted(STOP), pad_token_id=0
        )
        assert response == own[0, len(prompt) :].tolist()


def test_the_models_own_settings_change_nothing():
    """A checkpoint's generation_config may ask for penalties, a shortest length or another end."""
    model = model_of("llama")
    right = by_generate(model, 3).responses
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.eos_token_id, own.do_sample, own.temperature = 3.0, 9, 3, True, 0.1
    assert by_generate(model, 3).responses == right
    assert model.generation_config is own


def test_as_the_native_engine_near_ties_aside(monkeypatch):
    """In float32 the two sum in other orders: a draw may fall on the other side of a boundary it nearly hits, and only then."""
    model, sampling = model_of("llama").float(), Sampling(24, temperature=1.5)
    prompts, seeds = PROMPTS * 40, list(range(1000, 1000 + 40 * len(PROMPTS)))
    hf = by_generate(model, 64, prompts, sampling, seeds, stop={1})
    monkeypatch.setattr(test_refill, "SEEDS", seeds)
    native = sampled(model, 64, prompts, sampling, stop={1})
    near_ties = 0
    for row, (one, other) in enumerate(zip(hf.responses, native.responses, strict=True)):
        if one == other:
            assert hf.logprobs[row] == pytest.approx(native.logprobs[row], abs=1e-4)
            continue
        near_ties += 1
        place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        logits = model.double()(torch.tensor([prompts[row] + one[:place]])).logits[0, -1] / sampling.temperature
        draw = (splitmix64(seeds[row], place) >> 11) * 2.0**-53
        assert (logits.softmax(-1).cumsum(-1) - draw).abs().min() < 1e-5
    assert near_ties <= 2
    assert len({tuple(response) for response in hf.responses}) > 200


def test_one_row_by_definition():
    model = model_of("llama")
    assert by_generate(model, 1, [[4]], seeds=[99]).responses == [alone(model, [4], 99)]
