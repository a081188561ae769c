"""Stage 2, the reward model: learn which of two replies people prefer.

    rlhf rm --config rm --model runs/sft --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/rm.py --config configs/rm.yaml

Reads   a language model for the trunk (usually the SFT run), or a reward model to go on with; rows of prompt, chosen, rejected.
Writes  model/ (a sequence classification model with one label)  metrics.jsonl  run.json

One step: both replies of every pair in one forward, the score read at each one's last real token, -log sigmoid(difference)
averaged over the pairs of all ranks (Bradley and Terry 1952; Stiennon et al. 2020). Held-out accuracy comes with its 95%
interval and beside what "the longer reply wins" would get. Left out: margins, several replies a prompt, centring.
"""

from __future__ import annotations

import torch

from rlhf.config.parse import Invocation
from rlhf.config.schema import RmConfig
from rlhf.data.collate import pair_batch
from rlhf.data.examples import PairExample, pair_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.preference import accuracy, bradley_terry_loss, wilson_interval
from rlhf.models.roles import open_rm
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.training.entry import run_stage
from rlhf.training.opening import open_training
from rlhf.training.session import Training

SHOW = ("loss", "accuracy", "optimizer/lr")


def main(invocation: Invocation) -> None:
    config: RmConfig = invocation.config
    with open_training("rm", config, invocation.resume) as train:
        # -- who takes part, and what is learned from ----------------------------------------------------------------
        roles = open_rm(config)
        train.record_tokenizer(roles.tokenizer)
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)

        def read(path: str) -> list[PairExample]:
            pairs = train.read(path, pair_examples(path, config.data, template), "pairs")
            roles.check_context(max(map(len, pairs)), "data.max_length")
            return pairs

        pairs = read(config.data.train)
        held_out = read(config.data.eval) if config.data.eval else []

        batches = Batches(len(pairs), config.batch_size, train.seed("data"), config.schedule)
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            batch = sorted((pairs[index] for index in batches[step]), key=len)
            tokens = sum(map(tokens_of, batch))

            for micro in train.accumulate(batch, config.micro_batch_size):
                chosen, rejected = scores(policy, micro.items, train.device)
                loss = bradley_terry_loss(chosen, rejected).sum()
                train.backward(micro.weight * loss / len(batch))
                add_statistics(train.stats, micro.weight, chosen.detach(), rejected.detach(), "")
            train.optimizer_step(tokens)

            train.report(step, tokens, SHOW)
            if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(train, config, policy, held_out, step + 1)

        # -- the result ----------------------------------------------------------------------------------------------
        result = evaluate(train, config, policy, held_out, train.step_done) if held_out else {}
        train.consolidate()
        if train.is_main:
            save_model(roles.critic, train.run / "model", roles.tokenizer, merge=config.lora.merge)
        train.finish(result, ["model"])


def tokens_of(pair: PairExample) -> int:
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def scores(policy, pairs: list[PairExample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected), each (pairs,)."""
    both = policy(pair_batch(pairs).to(device), roles=("critic",)).values
    return both[::2], both[1::2]


def add_statistics(stats: Stats, weight: float, chosen: torch.Tensor, rejected: torch.Tensor, prefix: str) -> None:
    pairs = weight * len(chosen)
    stats.add(f"{prefix}loss", weight * bradley_terry_loss(chosen, rejected).sum(), pairs)
    stats.add(f"{prefix}accuracy", weight * accuracy(chosen, rejected).sum(), pairs)
    stats.add(f"{prefix}margin", weight * (chosen - rejected).sum(), pairs)
    stats.add(f"{prefix}score", weight * (chosen + rejected).sum() / 2, pairs)


def evaluate(train: Training, config: RmConfig, policy, pairs: list[PairExample], step: int) -> dict[str, float]:
    """Held-out accuracy with its 95% interval, beside the rule that the longer reply is the better one."""
    stats = Stats()
    with train.evaluating():
        for micro in train.accumulate(sorted(pairs, key=len), config.micro_batch_size):
            add_statistics(stats, micro.weight, *scores(policy, micro.items, train.device), "eval/")
    values = train.reduce(stats)
    low, high = wilson_interval(values["eval/accuracy"] * len(pairs), len(pairs))
    longer = [0.5 * (len(p.chosen) == len(p.rejected)) + (len(p.chosen) > len(p.rejected)) for p in pairs]
    values |= {"eval/accuracy_low": low, "eval/accuracy_high": high, "eval/pairs": len(pairs)}
    values["eval/longer_wins"] = sum(longer) / len(pairs)
    recorded = train.record_evaluation(step, values)
    train.note(
        f"held-out accuracy {values['eval/accuracy']:.3f} (95%: {low:.3f} to {high:.3f}, {len(pairs)} pairs); "
        f"taking the longer reply gets {values['eval/longer_wins']:.3f}"
    )
    return recorded


if __name__ == "__main__":
    run_stage("rm", main)
