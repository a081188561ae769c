"""Our losses, and their gradients, are those of TRL's trainers on the same batch."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from rlhf.config.schema import GrpoConfig
from rlhf.data.collate import comparisons, last_row, pad, ranking_batch, reply_row, sft_batch, token_batch
from rlhf.data.examples import PairExample, RankedExample, SftExample
from rlhf.functional.masked import zero_outside
from rlhf.functional.preference import bradley_terry_loss, center_penalty
from rlhf.functional.sft import sft_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor, load_scalar
from rlhf.report.stats import Stats
from rlhf.rollout.credit import RunningScores, credit_without_critic
from rlhf.rollout.experience import Experience
from rlhf.training.losses import actor_loss
from rlhf.training.tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("nothing_is_left")

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
    one_by_one = token_batch(last_row(pair.prompt, side) for pair in PAIRS for side in (pair.chosen, pair.rejected))
    assert torch.equal(scores, ActorCritic(critic=critic)(one_by_one, roles=("critic",)).values)
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


def rollouts(tiny) -> Experience:
    """Four replies to two prompts, with log-probs that are not the model's own.

    Prompts are of one length: TRL hands models no position ids, so learned positions begin at the pads of shorter ones.
    """
    generator = torch.Generator().manual_seed(0)
    replies = [[3, 4, 1], [5, 6, 7, 8, 1], [9, 2], [4, 4, 4, 1]]
    prompts = [[2, 3, 4], [2, 3, 4], [5, 6, 7], [5, 6, 7]]
    tokens, mask = pad(replies, 0)
    drawn = [-2 + 0.4 * torch.randn(mask.shape, generator=generator) for _ in range(2)]
    own = load_actor(str(tiny / "model"), Loading())
    with torch.no_grad():
        batch = token_batch(reply_row(*row) for row in zip(prompts, replies, strict=True))
        now = torch.zeros(mask.shape).masked_scatter(mask.bool(), ActorCritic(actor=own)(batch).logprobs)
    # within and beyond the clipping range, on both sides
    old, reference = (zero_outside(now + 0.3 * (draw + 2), mask) for draw in drawn)
    finished, scores = torch.tensor([True, True, False, True]), torch.tensor([1.0, -0.5, 2.0, 0.25])
    return Experience(prompts, tokens, mask, finished, old, old, None, reference, scores)


def of_trl(kind, tiny, tmp_path, experience: Experience, advantages, **settings):
    """(loss, gradients) of TRL's trainer on the rollouts, which it takes left-padded prompts and right-padded replies of."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_of, config_of = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    model, tokenizer = load_actor(str(tiny / "model"), Loading()), AutoTokenizer.from_pretrained(tiny / "model")
    sizes = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8}
    trainer = trainer_of(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=arguments(config_of, tmp_path, **sizes, **settings),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=tokenizer,
    )
    prompt_ids, prompt_mask = pad(experience.prompts, 0, left=True)
    old = experience.logprobs
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": experience.tokens,
        "completion_mask": experience.mask, "advantages": advantages, "old_per_token_logps": old,
        "old_logps": (old * experience.mask).sum(1), "ref_per_token_logps": experience.reference_logprobs,
        "num_items_in_batch": experience.mask.sum(),
    }  # fmt: skip
    model.eval()  # its losses are then those of a batch, whatever the accumulation
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return loss, gradients(model)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("grpo", {"loss_type": "grpo"}, {"aggregation": "replies"}),
        ("grpo", {"loss_type": "bnpo"}, {"aggregation": "tokens"}),
        ("grpo", {"loss_type": "dapo", "epsilon_high": 0.28}, {"aggregation": "tokens", "clip_high": 0.28}),
        ("grpo", {"loss_type": "dr_grpo"}, {"aggregation": "constant"}),
        ("grpo", {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}, {"aggregation": "replies", "kl": 0.04}),
        ("grpo", {"loss_type": "grpo", "delta": 1.5}, {"aggregation": "replies", "dual_clip": 1.5}),
        ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, {"ratio_of": "reply_mean"}),
        ("rloo", {}, {"ratio_of": "reply"}),
    ],
    ids=str,
)
def test_losses_without_a_critic(kind, theirs, ours, tiny, tmp_path):
    """On fixed rollouts our loss and its gradient are TRL's, to 1e-6, in each of the forms that both have."""
    experience = rollouts(tiny)
    groups = experience.scores.view(2, 2)
    if kind == "grpo":  # as in TRL's grpo_trainer.py: less the mean, over the deviation of a sample plus 1e-4
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    else:  # each less the mean of the others
        advantages = (groups - groups.flip(1)).flatten()
    loss, their_gradients = of_trl(kind, tiny, tmp_path, experience, advantages, **theirs)

    kl_coef = ours.pop("kl", 0.0)
    coefs = {"coef": kl_coef, "estimator": "k3", "place": "loss"}
    config = GrpoConfig.model_validate(
        {
            "output": "o", "roles": {"actor": "a"}, "data": {"train": "t"},
            "reward": {"source": "count:a", "missing_eos": "none"},
            "rollout": {"batch_size": 2, "samples_per_prompt": 2, "max_new_tokens": 8}, "kl": coefs,
            "grpo": {"estimator": kind, "minibatch_size": 4} | ours,
        }
    )  # fmt: skip
    credited, _ = credit_without_critic(experience, config, kl_coef, RunningScores())
    assert torch.allclose(credited.advantages, advantages[:, None] * experience.mask, atol=1e-6)
    actor = load_actor(str(tiny / "model"), Loading())
    weighed = credited.weighed(range(4), config.grpo.aggregation, config.rollout.max_new_tokens)
    parts = [weighed.rows(rows) for rows in ([0, 1, 2], [3])]
    policy = ActorCritic(actor=actor)
    total = sum(actor_loss(policy(part.batch()), part, config.grpo, config.kl, kl_coef, Stats()) for part in parts)
    total.backward()
    assert_same(total, loss, gradients(actor), their_gradients)
