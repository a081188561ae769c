"""TRL 1.16's RewardTrainer on pairs of token ids; says the tokens of each step: no pads, the prompt once for each reply."""

from __future__ import annotations

import torch
from _trainer import JOB, CountsTokens, StepTurns, arguments, load, rows, tokenizer_of
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer


class Counting(CountsTokens, RewardTrainer): ...


def main() -> None:
    torch.set_num_threads(JOB["threads"])
    tokenizer = tokenizer_of(JOB["model"])

    def ids(side: str) -> list[list[int]]:
        return [tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id] for row in rows(JOB["data"])]

    config = arguments(
        RewardConfig,
        per_device_train_batch_size=JOB["batch_size"],
        max_steps=10000,
        learning_rate=JOB["lr"],
        lr_scheduler_type="constant",
    )
    Counting(
        model=load(AutoModelForSequenceClassification, JOB["model"], num_labels=1),
        args=config,
        train_dataset=Dataset.from_dict({f"{side}_ids": ids(side) for side in ("chosen", "rejected")}),
        processing_class=tokenizer,
        callbacks=[StepTurns(Counting.told)],
    ).train()


main()
