"""TRL 1.16's SFTTrainer on rows grouped by length, loss on every token; says the tokens of each step, without pads."""

from __future__ import annotations

import torch
from _trainer import JOB, CountsTokens, StepTurns, arguments, load, rows, tokenizer_of
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


class Counting(CountsTokens, SFTTrainer): ...


def main() -> None:
    torch.set_num_threads(JOB["threads"])
    tokenizer = tokenizer_of(JOB["model"])
    ids = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in rows(JOB["data"])]
    config = arguments(
        SFTConfig,
        per_device_train_batch_size=JOB["batch_size"],
        max_steps=10000,
        max_length=JOB["max_length"],
        learning_rate=JOB["lr"],
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length",
    )
    Counting(
        model=load(AutoModelForCausalLM, JOB["model"]),
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        callbacks=[StepTurns(Counting.told)],
    ).train()


main()
