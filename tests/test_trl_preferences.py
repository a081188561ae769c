"""The losses of stages/dpo.py and stages/kto.py, and their gradients, are those of TRL's trainers on the same batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from harness import stage_module
from transformers import AutoTokenizer

from rlhf.config.preferences import DpoLoss, KtoLoss
from rlhf.data.examples import PairExample, RatedExample, mismatched
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.load import Loading, load_actor
from rlhf.training.reference import log_ratios, reply_logprobs
from rlhf.training.tiny import write_tiny_model

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CPU = torch.device("cpu")
PAIRS = [PairExample([2, 3], [4, 1], [5, 6, 1]), PairExample([7], [8, 8, 8, 1], [9, 1]), PairExample([2, 3], [5, 1], [4, 4])]
RATED = [RatedExample([2, 3], [4, 1], True), RatedExample([7], [8, 8, 8, 1], False), RatedExample([5, 5], [9, 6], True)]
TEXTS = {"prompt": ["a b", "c c d"], "chosen": [" e f", " g"], "rejected": [" h", " a b a"]}
ARGUMENTS = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(of the policy, of another one that is its reference, tokenizer)"""
    places = [tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference")]
    for seed, place in enumerate(places):
        write_tiny_model(place, seed)
    return *(str(place / "model") for place in places), AutoTokenizer.from_pretrained(places[0] / "model")


def referred(examples, reference: str) -> list:
    """The examples with what the reference thinks of their replies."""
    with torch.no_grad():
        found = reply_logprobs(ActorCritic(actor=load_actor(reference, Loading())), examples, CPU).tolist()
    return [replace(example, reference=tuple(values)) for example, values in zip(examples, found, strict=True)]


def our_loss(policy: str, pairs: list[PairExample], loss: DpoLoss):
    """(mean over the pairs, gradients), as the page computes them."""
    page, actor = stage_module("dpo"), load_actor(policy, Loading())
    logprobs = reply_logprobs(ActorCritic(actor=actor), pairs, CPU)
    return derived(page.losses(*page.scores(logprobs, pairs, loss), loss).mean(), actor)


def derived(loss: torch.Tensor, model) -> tuple[float, dict[str, torch.Tensor]]:
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in ours[1].items():
        assert torch.allclose(gradient, theirs[1][name], atol=1e-5), name
    assert max(gradient.abs().max() for gradient in ours[1].values()) > 1e-3


@pytest.mark.parametrize(("kind", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_dpo_and_ipo(kind, theirs, models, tmp_path):
    from trl import DPOConfig, DPOTrainer

    policy, reference, tokenizer = models
    model = load_actor(policy, Loading())
    trainer = DPOTrainer(
        model,
        load_actor(reference, Loading()),
        DPOConfig(output_dir=str(tmp_path), beta=0.3, loss_type=theirs, **ARGUMENTS),
        train_dataset=Dataset.from_dict(TEXTS),
        processing_class=tokenizer,
    )
    rows = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in PAIRS]
    expected = derived(trainer.compute_loss(model, dict(trainer.data_collator(rows))), model)
    assert_same(our_loss(policy, referred(PAIRS, reference), DpoLoss(kind=kind, beta=0.3)), expected)


def pairs_of(batch) -> list[PairExample]:
    """The pairs in a batch of CPOTrainer and ORPOTrainer."""

    def reply(side: str, row: int) -> list[int]:
        return [int(token) for token in batch[f"{side}_labels"][row] if token != -100]

    padded = zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], strict=True)
    prompts = [row[mask.bool()].tolist() for row, mask in padded]
    return [PairExample(prompt, reply("chosen", row), reply("rejected", row)) for row, prompt in enumerate(prompts)]


@pytest.fixture
def cpo(models, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    def trainer(model, **options) -> CPOTrainer:
        arguments = CPOConfig(output_dir=str(tmp_path), **options, **ARGUMENTS)
        return CPOTrainer(model, arguments, train_dataset=Dataset.from_dict(TEXTS), processing_class=models[2])

    return trainer


def test_simpo(models, cpo):
    policy, model = models[0], load_actor(models[0], Loading())
    trainer = cpo(model, loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=0.7)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = derived(trainer.get_batch_loss_metrics(model, batch)[0], model)
    assert_same(our_loss(policy, pairs_of(batch), DpoLoss(kind="simpo", beta=2.5, gamma=0.7)), expected)


def test_conservative_dpo(models, cpo):
    """TRL's DPOTrainer has no label smoothing in this loss; CPO's, given log-ratios, is the same formula."""
    trainer = cpo(load_actor(models[0], Loading()), loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    ratios = torch.tensor([[1.5, -2.0], [-0.5, 3.0]])
    theirs = trainer.cpo_loss(ratios[0], ratios[1])[0]
    ours = stage_module("dpo").losses(ratios[0], ratios[1], DpoLoss(beta=0.3, label_smoothing=0.2))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_orpo(models, tmp_path):
    """But for the loss on the chosen reply: TRL takes it on the prompt as well, the paper's equation 1 does not."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, _, tokenizer = models
    model = load_actor(policy, Loading())
    arguments = ORPOConfig(output_dir=str(tmp_path), beta=0.4, **ARGUMENTS)
    trainer = ORPOTrainer(model, arguments, train_dataset=Dataset.from_dict(TEXTS), processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.concatenated_forward(model, batch)[:2]
    expected = derived(-chosen.mean() - trainer.odds_ratio_loss(chosen, rejected)[0].mean(), model)
    assert_same(our_loss(policy, pairs_of(batch), DpoLoss(kind="orpo", odds_weight=0.4)), expected)


@pytest.mark.parametrize("swapped", [False, True])  # one of the two baselines is above 0, and the other is cut off there
def test_kto(swapped, models, tmp_path):
    from trl import KTOConfig, KTOTrainer

    policy, reference = (models[1], models[0]) if swapped else models[:2]
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    more = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    model = load_actor(policy, Loading())
    trainer = KTOTrainer(
        model,
        load_actor(reference, Loading()),
        KTOConfig(output_dir=str(tmp_path), **more, **options, **ARGUMENTS),
        train_dataset=Dataset.from_dict(
            {"prompt": TEXTS["prompt"], "completion": TEXTS["chosen"], "label": [True, False]},
        ),
        processing_class=models[2],
    )
    others = mismatched(RATED, limit=64)
    assert [other.reply for other in others] == [RATED[row - 1].reply for row in range(3)]  # TRL's shift: all prompts differ
    rows = [
        {"prompt_ids": row.prompt, "completion_ids": row.reply, "KL_completion_ids": other.reply, "label": row.desirable}
        for row, other in zip(RATED, others, strict=True)
    ]
    expected = derived(trainer.compute_loss(model, dict(trainer.data_collator(rows))), model)

    page, actor = stage_module("kto"), load_actor(policy, Loading())
    both, examples, compared = ActorCritic(actor=actor), referred(RATED, reference), referred(others, reference)
    with torch.no_grad():
        z_0 = log_ratios(reply_logprobs(both, compared, CPU), compared).mean().item()
    assert (z_0 > 0) != swapped
    ratios = log_ratios(reply_logprobs(both, examples, CPU), examples)[:, 0]
    config = SimpleNamespace(loss=KtoLoss(**options))
    assert_same(derived(page.losses(ratios, examples, max(0.0, z_0), config).mean(), actor), expected)
