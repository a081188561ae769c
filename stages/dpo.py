"""Preference optimisation on pairs, without a reward model and without samples: DPO, and IPO, SimPO, ORPO beside it.

    rlhf dpo --config dpo --model runs/sft --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/dpo.py --config configs/dpo.yaml

Reads   a policy (usually the SFT run); rows of prompt, chosen, rejected, as `rlhf rm` reads them.
Writes  model/  metrics.jsonl  run.json

Before the first step the reference's log-probabilities of all replies are computed, once: by the policy itself, which still is
the reference then, so no second model is in memory. One step: both replies of every pair in one forward, behind their one
prompt; each gets a score, log pi - log pi_ref (SimPO and ORPO: log pi); the loss of a pair's two scores is averaged over the
pairs of all ranks (Rafailov et al. 2023, arXiv:2305.18290). A reply's implicit reward is beta * score. Conventions, and where
the losses differ: docs/dpo.md. Left out: sampling new replies; replies rated one by one, which have a page of their own.
"""

from __future__ import annotations

import torch

from rlhf.config.parse import Invocation
from rlhf.config.preferences import DpoLoss
from rlhf.config.schema import DpoConfig
from rlhf.data.examples import PairExample, pair_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.dpo import PAIR_LOSSES
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

SHOW = ("loss", "accuracy", "margin")


def main(invocation: Invocation) -> None:
    config: DpoConfig = invocation.config
    with open_training("dpo", config, invocation.resume) as train:
        # -- who takes part, and what is learned from ----------------------------------------------------------------
        roles = open_dpo(config)
        train.record_tokenizer(roles.tokenizer)
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)

        def read(path: str) -> list[PairExample]:
            pairs = train.read(path, pair_examples(path, config.data, template), "pairs")
            roles.check_context(max(map(len, pairs)), "data.max_length")
            return pairs

        pairs = read(config.data.train)
        held_out = sorted(read(config.data.eval), key=len) if config.data.eval else []

        batches = Batches(len(pairs), config.batch_size, train.seed("data"), config.schedule)
        once = ReferenceLogprobs(train, config.micro_batch_size)
        for frozen in roles.frozen:
            roles.prepared(frozen, train.prepare_frozen(frozen))
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)
        roles.prepared(roles.policy, policy)
        roles.calibrate([pairs[index].prompt for index in batches[0]], config.micro_batch_size)
        if roles.reference is not None:
            as_seen = [sorted(batch, key=lambda index: len(pairs[index])) for batch in batches.first_epoch()]
            pairs = once.beside("training", pairs, as_seen, roles.reference.model)
            held_out = once.beside("held-out", held_out, [range(len(held_out))], roles.reference.model)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            batch = sorted((pairs[index] for index in batches[step]), key=len)

            for micro in train.accumulate(batch, config.micro_batch_size):
                logprobs = reply_logprobs(policy, micro.items, train.device)
                loss = losses(*scores(logprobs, micro.items, config.loss), config.loss).sum()
                train.backward(micro.weight * loss / len(batch))
                add_statistics(train.stats, micro, logprobs.detach(), config.loss, "")
            if step == 0 and roles.starts_as_reference:
                require_equal_start(train, batches[0])
            train.optimizer_step(sum(len(reply) for pair in batch for reply in pair.replies))

            train.report(step, sum(map(tokens_of, batch)), SHOW)
            if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(train, config, policy, held_out, step + 1)

        # -- the result ----------------------------------------------------------------------------------------------
        result = evaluate(train, config, policy, held_out, train.step_done) if held_out else {}
        train.consolidate()
        if train.is_main:
            save_model(roles.actor, train.run / "model", roles.tokenizer, roles.generation, config.lora.merge)
        train.finish(result, ["model"])


def tokens_of(pair: PairExample) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def scores(logprobs: torch.Tensor, pairs: list[PairExample], loss: DpoLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected), each (pairs,), from log p of both replies, (pairs, 2)."""
    found = log_ratios(logprobs, pairs) if loss.referenced else logprobs
    if PAIR_LOSSES[loss.kind].averaged:
        found = found / torch.tensor([[len(reply) for reply in pair.replies] for pair in pairs], device=found.device)
    return found[:, 0], found[:, 1]


def losses(chosen: torch.Tensor, rejected: torch.Tensor, loss: DpoLoss) -> torch.Tensor:
    """(pairs,)"""
    return PAIR_LOSSES[loss.kind].loss(chosen, rejected, **loss.options)


def add_statistics(stats: Stats, micro: MicroBatch, logprobs: torch.Tensor, loss: DpoLoss, prefix: str) -> None:
    chosen, rejected = scores(logprobs, micro.items, loss)
    beta = loss.options.get("beta", 1.0)
    values = {
        "loss": losses(chosen, rejected, loss),
        "accuracy": accuracy(chosen, rejected),
        "margin": beta * (chosen - rejected),
        "reward/chosen": beta * chosen,
        "reward/rejected": beta * rejected,
        "logprob/chosen": logprobs[:, 0],
        "logprob/rejected": logprobs[:, 1],
    }
    if loss.referenced:
        values["drift"] = (chosen.abs() + rejected.abs()) / 2
    for name, value in values.items():
        stats.add(f"{prefix}{name}", micro.weight * value.sum(), micro.weight * len(value))


def evaluate(train: Training, config: DpoConfig, policy, pairs: list[PairExample], step: int) -> dict[str, float]:
    """Of held-out pairs: the loss, and how often the chosen reply has the higher implicit reward, with its 95% interval."""
    stats = Stats()
    with train.evaluating():
        for micro in train.accumulate(pairs, config.micro_batch_size):
            add_statistics(stats, micro, reply_logprobs(policy, micro.items, train.device), config.loss, "eval/")
    return record_accuracy(train, step, train.reduce(stats), len(pairs), "pairs")


if __name__ == "__main__":
    run_stage("dpo", main)
