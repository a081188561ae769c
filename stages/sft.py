"""Stage 1, supervised fine-tuning: teach a pre-trained model to answer as the demonstrations do.

    rlhf sft --config sft --model DIR --data FILE
    accelerate launch --config_file configs/launch/ddp.yaml stages/sft.py --config configs/sft.yaml

Reads   a language model; rows of messages, prompt/response or plain text.
Writes  model/  metrics.jsonl  run.json

One step: take the next global batch, forward, sum -log p over the trained tokens of all ranks, divide by their number, step.
On plain text this is continued pre-training: every token carries the loss, and a long document becomes several rows. Left
out: dropout (off in every stage), and mixing of several data sets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlhf.config.parse import Invocation
from rlhf.config.schema import SftConfig
from rlhf.data.collate import pack, sft_batch
from rlhf.data.examples import SftExample, sft_examples
from rlhf.data.order import Batches
from rlhf.data.templates import Template
from rlhf.functional.sft import sft_loss
from rlhf.models.roles import open_sft
from rlhf.models.save import save_model
from rlhf.report.stats import Stats
from rlhf.training.entry import run_stage
from rlhf.training.opening import open_training
from rlhf.training.session import Training

SHOW = ("loss", "optimizer/lr")


def main(invocation: Invocation) -> None:
    config: SftConfig = invocation.config
    with open_training("sft", config, invocation.resume) as train:
        # -- who takes part, and what is learned from ----------------------------------------------------------------
        roles = open_sft(config)
        train.record_tokenizer(roles.tokenizer)
        template = Template(roles.tokenizer, config.data.template, roles.stop_ids)

        def read(path: str) -> list:
            """Examples, or with packing lists of examples that share a sequence."""
            rows = train.read(path, sft_examples(path, config.data, template), "rows")
            roles.check_context(max(map(len, rows)), "data.max_length")
            return pack(rows, config.data.max_length) if config.data.packing else rows

        examples = read(config.data.train)
        held_out = read(config.data.eval) if config.data.eval else []

        batches = Batches(len(examples), config.batch_size, train.seed("data"), config.schedule)
        policy = train.prepare(roles.policy, config.optimizer, config.schedule, batches.length)

        # -- the loop ------------------------------------------------------------------------------------------------
        for step in train.steps():
            if held_out and step == 0:
                evaluate(train, config, policy, held_out, 0)
            batch = sorted((examples[index] for index in batches[step]), key=size)  # every rank gets short ones and long ones
            tokens = sum(map(trained_tokens, batch))

            for micro in train.accumulate(batch, config.micro_batch_size):
                rows = sft_batch(examples_of(micro.items)).to(train.device)
                loss = sft_loss(policy(rows, roles=("actor",)).logprobs)
                train.backward(micro.weight * loss / tokens)
                train.stats.add("loss", micro.weight * loss.detach(), micro.weight * len(rows.targets))
            train.optimizer_step(tokens)

            train.report(step, sum(map(size, batch)), SHOW)
            if held_out and config.eval_every and (step + 1) % config.eval_every == 0:
                evaluate(train, config, policy, held_out, step + 1)

        # -- the result ----------------------------------------------------------------------------------------------
        result = evaluate(train, config, policy, held_out, train.step_done) if held_out else {}
        train.consolidate()
        if train.is_main:
            save_model(roles.actor, train.run / "model", roles.tokenizer, roles.generation, config.lora.merge)
        train.finish(result, ["model"])


def examples_of(rows: list) -> Iterator[SftExample]:
    """Without packs, which say what is computed together and nothing else."""
    for row in rows:
        yield from row if isinstance(row, list) else [row]


def size(row: SftExample | list[SftExample]) -> int:
    """Tokens of a row."""
    return sum(map(len, row)) if isinstance(row, list) else len(row)


def trained_tokens(row: SftExample | list[SftExample]) -> int:
    """Tokens that carry loss: of an example all that are trained but the first, which nothing predicts."""
    return sum(map(trained_tokens, row)) if isinstance(row, list) else sum(row.trained[1:])


def evaluate(train: Training, config: SftConfig, policy, rows: list, step: int) -> dict[str, float]:
    """Mean loss per trained token of held-out rows, and its exponential."""
    stats = Stats()
    with train.evaluating():
        for micro in train.accumulate(sorted(rows, key=size), config.micro_batch_size):
            batch = sft_batch(examples_of(micro.items)).to(train.device)
            loss = sft_loss(policy(batch, roles=("actor",)).logprobs)
            stats.add("eval/loss", micro.weight * loss, micro.weight * len(batch.targets))
    values = train.reduce(stats)
    values["eval/perplexity"] = torch.tensor(values["eval/loss"]).double().exp().item()  # infinite where math.exp raises
    return train.record_evaluation(step, values)


if __name__ == "__main__":
    run_stage("sft", main)
