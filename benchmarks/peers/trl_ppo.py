"""TRL 1.12's PPOTrainer: four models (policy, reference, reward, value), each with a trunk of its own; an iteration is a turn.

Says the number of reply tokens, EOS included, and the CPU seconds of `generate`.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from _trainer import JOB, StepTurns, arguments, load, prompt_ids, rows, tokenizer_of
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

replies: list[torch.Tensor] = []
generating = 0.0


def watch_generation() -> None:
    generate = ppo_trainer.batch_generation

    def watched(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        global generating
        began = time.process_time()
        result = generate(model, queries, *rest)
        generating += time.process_time() - began
        replies.append(result[0][:, queries.shape[1] :])
        return result

    ppo_trainer.batch_generation = watched


def reply_tokens(end: int) -> int:
    """Of the last rollout."""
    ended = (replies[-1] == end).cumsum(1)
    return int(((ended - (replies[-1] == end).int()) == 0).sum())


def main() -> None:
    global generating
    torch.set_num_threads(JOB["threads"])
    tokenizer = tokenizer_of(JOB["policy"])
    prompts = Dataset.from_dict({"input_ids": [prompt_ids(tokenizer, row["prompt"]) for row in rows(JOB["data"])]})
    batch, micro = JOB["batch_size"], JOB["micro_batch_size"]
    config = arguments(
        PPOConfig,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        local_rollout_forward_batch_size=JOB.get("rollout_batch_size", batch),
        total_episodes=batch * JOB.get("length", 1000),
        num_ppo_epochs=JOB["epochs"],
        response_length=JOB["reply_tokens"],
        stop_token="eos" if JOB["stops"] else None,
        temperature=1.0,
        kl_coef=JOB["kl_coef"],
        learning_rate=JOB["lr"],
        num_sample_generations=0,
        eval_strategy="no",
        **JOB.get("more", {}),
    )
    watch_generation()
    held_out = [row["prompt"] for row in rows(JOB["held_out"])] if "held_out" in JOB else []

    def told(step: int) -> dict[str, Any]:
        global generating
        phases, generating = {"rollout": generating}, 0.0
        said = {"step": step, "reply_tokens": reply_tokens(tokenizer.eos_token_id), "phases": phases}
        return said | ({"evaluations": [evaluation(step)]} if held_out and step % JOB["evaluate_every"] == 0 else {})

    def evaluation(step: int) -> dict[str, float]:
        from _evaluation import evaluate

        policy, samples = trainer.accelerator.unwrap_model(trainer.model).policy, JOB["samples"]
        found = evaluate(policy, trainer.ref_model, tokenizer, held_out, samples, JOB["reply_tokens"])
        return {"step": step} | found

    turns, scalar = StepTurns(told), {"num_labels": 1}
    policy = load(AutoModelForCausalLM, JOB["policy"])
    value = load(AutoModelForSequenceClassification, JOB["reward"], **scalar)
    if JOB.get("gradient_checkpointing"):  # PPOTrainer's own argument of this name reaches no model
        policy.gradient_checkpointing_enable()
        value.gradient_checkpointing_enable()
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(AutoModelForCausalLM, JOB["policy"]),
        reward_model=load(AutoModelForSequenceClassification, JOB["reward"], **scalar),
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),  # asked for, and not used without sample generations
        callbacks=[turns],
    )
    turns.turns.begin()
    trainer.train()
    turns.turns.end(evaluations=[])


main()
