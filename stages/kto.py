"""Preference optimisation on replies that were rated one by one, good or bad: KTO.

    rlhf kto --config kto --model runs/sft --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/kto.py --config configs/kto.yaml

Reads   a policy (usually the SFT run); rows of prompt, completion, label (true: desirable), or pairs, whose chosen reply is
        desirable and whose rejected one is not.
Writes  model/  metrics.jsonl  run.json

Before the first step the log-probabilities of all replies are computed by the policy itself, which then still is the reference.
One step, in the notation of Ethayarajh et al. 2024 (arXiv:2402.01306):

    1. z_0    mean log-ratio of the batch's prompts with replies to other prompts, at least 0: how far the policy has drifted
    2. loss   1 - sigmoid(beta (log-ratio - z_0)) of a desirable reply, with the sign turned of an undesirable one

Conventions: docs/dpo.md. Left out: weights that follow from the counts of good and bad replies, which are set by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf.config.parse import Invocation
from rlhf.config.schema import KtoConfig
from rlhf.data.examples import RatedExample, mismatched, rated_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.dpo import kto_loss
from rlhf.functional.preference import accuracy
from rlhf.models.roles import open_dpo
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.training.accumulation import MicroBatch
from rlhf.training.entry import run_stage
from rlhf.training.opening import open_training
from rlhf.training.reference import ReferenceLogprobs, log_ratios, reply_logprobs, require_equal_start
from rlhf.training.reward_figures import record_accuracy
from rlhf.training.session import Training

SHOW = ("loss", "accuracy", "baseline")


def main(invocation: Invocation) -> None:
    config: KtoConfig = invocation.config
    with open_training("kto", config, invocation.resume) as train:
        # -- who takes part, and what is learned from ----------------------------------------------------------------
        roles = open_dpo(config)
        train.record_tokenizer(roles.tokenizer)
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)

        def read(path: str) -> list[RatedExample]:
            rows = train.read(path, rated_examples(path, config.data, template), "replies")
            roles.check_context(max(map(len, rows)), "data.max_length")
            return rows

        rows = read(config.data.train)
        others = mismatched(rows, config.data.max_length)
        held_out = read(config.data.eval) if config.data.eval else []
        held_out_others = sorted(mismatched(held_out, config.data.max_length), key=len) if held_out else []
        held_out = sorted(held_out, key=len)

        batches = Batches(len(rows), config.batch_size, train.seed("data"), config.schedule)
        once = ReferenceLogprobs(train, config.micro_batch_size)
        for frozen in roles.frozen:
            roles.prepared(frozen, train.prepare_frozen(frozen))
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)
        roles.prepared(roles.policy, policy)
        roles.calibrate([rows[index].prompt for index in batches[0]], config.micro_batch_size)
        assert roles.reference is not None
        reference = roles.reference.model
        as_seen = [sorted(batch, key=lambda index: len(rows[index])) for batch in batches.first_epoch()]
        rows = once.beside("training", rows, as_seen, reference)
        others = once.beside("mismatched training", others, as_seen, reference)
        held_out = once.beside("held-out", held_out, [range(len(held_out))], reference)
        held_out_others = once.beside("mismatched held-out", held_out_others, [range(len(held_out))], reference)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            places = sorted(batches[step], key=lambda index: len(rows[index]))
            batch = [rows[index] for index in places]

            # 1: before the loss of any reply, as it is of the whole batch
            z_0 = baseline(train, config, policy, [others[index] for index in places])
            train.stats.put({"baseline": z_0})

            # 2
            for micro in train.accumulate(batch, config.micro_batch_size):
                logprobs = reply_logprobs(policy, micro.items, train.device)
                loss = losses(log_ratios(logprobs, micro.items)[:, 0], micro.items, z_0, config).sum()
                train.backward(micro.weight * loss / len(batch))
                add_statistics(train.stats, micro, logprobs.detach(), z_0, config, "")
            if step == 0 and roles.starts_as_reference:
                require_equal_start(train, batches[0])
            train.optimizer_step(sum(len(row.reply) for row in batch))

            train.report(step, sum(map(len, batch)) + sum(len(others[index]) for index in places), SHOW)
            if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(train, config, policy, held_out, held_out_others, step + 1)

        # -- the result ----------------------------------------------------------------------------------------------
        result = evaluate(train, config, policy, held_out, held_out_others, train.step_done) if held_out else {}
        train.consolidate()
        if train.is_main:
            save_model(roles.actor, train.run / "model", roles.tokenizer, roles.generation, config.lora.merge)
        train.finish(result, ["model"])


def baseline(train: Training, config: KtoConfig, policy, others: Sequence[RatedExample]) -> float:
    """z_0 in nats, of prompts with replies to other prompts; equal on all ranks."""
    stats = Stats()
    with train.evaluating():
        for micro in train.accumulate(others, config.micro_batch_size):
            ratios = log_ratios(reply_logprobs(policy, micro.items, train.device), micro.items)
            stats.add("baseline", micro.weight * ratios.sum(), micro.weight * len(ratios))
    found = train.reduce(stats)["baseline"]
    return 0.0 if found < 0 else found  # NaN stays NaN, for the loss to show


def desirable(rows: list[RatedExample], device: torch.device) -> torch.Tensor:
    return torch.tensor([row.desirable for row in rows], device=device)


def losses(ratios: torch.Tensor, rows: list[RatedExample], z_0: float, config: KtoConfig) -> torch.Tensor:
    """(rows,)"""
    return kto_loss(ratios, desirable(rows, ratios.device), z_0, **config.loss.model_dump())


def add_statistics(stats: Stats, micro: MicroBatch, logprobs: torch.Tensor, z_0: float, config: KtoConfig, prefix: str) -> None:
    """A reply is right where it is on its side of the baseline: a desirable one above, an undesirable one below."""
    good, ratios = desirable(micro.items, logprobs.device), log_ratios(logprobs, micro.items)[:, 0]
    above = accuracy(ratios, torch.full_like(ratios, z_0))
    every = {
        "loss": losses(ratios, micro.items, z_0, config),
        "accuracy": torch.where(good, above, 1 - above),
        "drift": ratios.abs(),
    }
    for name, value in every.items():
        stats.add(f"{prefix}{name}", micro.weight * value.sum(), micro.weight * len(value))
    for kind, which in (("desirable", good), ("undesirable", ~good)):
        count = micro.weight * which.sum()
        stats.add(f"{prefix}reward/{kind}", micro.weight * config.loss.beta * ratios[which].sum(), count)
        stats.add(f"{prefix}logprob/{kind}", micro.weight * logprobs[which].sum(), count)


def evaluate(
    train: Training, config: KtoConfig, policy, rows: list[RatedExample], others: list[RatedExample], step: int
) -> dict[str, float]:
    """Of held-out replies, with a baseline of their own: the loss, and how many are on their side, with the 95% interval."""
    stats, z_0 = Stats(), baseline(train, config, policy, others)
    with train.evaluating():
        for micro in train.accumulate(rows, config.micro_batch_size):
            add_statistics(stats, micro, reply_logprobs(policy, micro.items, train.device), z_0, config, "eval/")
    return record_accuracy(train, step, train.reduce(stats) | {"eval/baseline": z_0}, len(rows), "replies")


if __name__ == "__main__":
    run_stage("kto", main)
