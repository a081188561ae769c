"""TRL 1.16's GRPOTrainer or RLOOTrainer with a reward model; a step is one of the epochs over a rollout."""

from __future__ import annotations

import torch
from _trainer import JOB, StepTurns, arguments, load, rows, tokenizer_of
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


def main() -> None:
    torch.set_num_threads(JOB["threads"])
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[JOB["estimator"]]
    reader = tokenizer_of(JOB["reward"])
    reader.padding_side = "right"
    trainer(
        model=load(AutoModelForCausalLM, JOB["policy"]),
        reward_funcs=load(AutoModelForSequenceClassification, JOB["reward"], num_labels=1),
        args=arguments(
            config,
            per_device_train_batch_size=JOB["batch_size"],
            num_generations=JOB["samples"],
            max_completion_length=JOB["reply_tokens"],
            num_iterations=JOB["epochs"],
            steps_per_generation=1,
            max_steps=10000,
            beta=JOB["kl_coef"],
            temperature=1.0,
            top_k=0,
            learning_rate=JOB["lr"],
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows(JOB["data"])]),
        processing_class=tokenizer_of(JOB["policy"]),
        reward_processing_classes=reader,
        callbacks=[StepTurns(lambda _: {"phases": {}})],
    ).train()


main()
