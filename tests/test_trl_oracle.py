"""Our SFT and reward model losses, and their gradients, are those of TRL's trainers on the same batch."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf.data.collate import comparisons, pair_batch, ranking_batch, sft_batch
from rlhf.data.examples import PairExample, RankedExample, SftExample
from rlhf.functional.preference import bradley_terry_loss, center_penalty
from rlhf.functional.sft import sft_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.training.tiny import write_tiny_model

SFT = [SftExample([2, 3, 4, 5, 1], [False, False, True, True, True]), SftExample([6, 7, 1], [False, True, True])]
PAIRS = [PairExample([2, 3], [4, 1], [5, 6, 1]), PairExample([7], [8, 8, 8, 1], [9, 1])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, seed=0)
    return directory


def arguments(kind, directory, **more):
    plain = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    return kind(output_dir=str(directory), **plain, **more)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, our_gradients, their_gradients) -> None:
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in our_gradients.items():
        assert torch.allclose(gradient, their_gradients[name], atol=1e-6), name


def test_sft(tiny, tmp_path):
    from trl import SFTConfig, SFTTrainer

    actor = load_actor(str(tiny / "model"), Loading())
    batch = sft_batch(SFT)
    total, count = sft_loss(ActorCritic(actor=actor)(batch, roles=("actor",)).logprobs), len(batch.targets)
    (total / count).backward()

    model = load_actor(str(tiny / "model"), Loading())  # a plain transformers model; the trainer uses its own forward
    rows = Dataset.from_list([{"input_ids": e.ids, "completion_mask": [int(t) for t in e.trained]} for e in SFT])
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    trainer = SFTTrainer(
        model, arguments(SFTConfig, tmp_path, completion_only_loss=True), train_dataset=rows, processing_class=tokenizer
    )
    inputs = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    assert_same(total / count, loss, gradients(actor), gradients(model))


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("margins", [None, (0.5, 2.0)])
def test_reward_model(center, margins, tiny, tmp_path):
    from trl import RewardConfig, RewardTrainer

    critic = load_scalar(str(tiny / "critic"), Loading())
    ranked = [
        RankedExample(pair.prompt, [pair.chosen, pair.rejected], [0, 1], margin)
        for pair, margin in zip(PAIRS, margins or (0.0, 0.0), strict=True)
    ]
    scores = ActorCritic(critic=critic)(ranking_batch(ranked), roles=("critic",)).values
    assert torch.equal(scores, ActorCritic(critic=critic)(pair_batch(PAIRS), roles=("critic",)).values)
    pairs = comparisons(ranked, like=scores)
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    ours = bradley_terry_loss(chosen, rejected, pairs.margin, pairs.target).mean()
    ours = ours + (center or 0.0) * center_penalty(chosen, rejected).mean()
    ours.backward()

    model = load_scalar(str(tiny / "critic"), Loading())  # plain transformers; TRL uses its own forward
    rows = Dataset.from_list(
        [
            {"chosen_ids": p.prompt + p.chosen, "rejected_ids": p.prompt + p.rejected}
            | ({"margin": margins[i]} if margins else {})
            for i, p in enumerate(PAIRS)
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny / "critic")
    trainer = RewardTrainer(
        model,
        arguments(RewardConfig, tmp_path, center_rewards_coefficient=center),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(model, dict(trainer.data_collator([dict(row) for row in rows])))
    loss.backward()
    assert_same(ours, loss, gradients(critic), gradients(model))
