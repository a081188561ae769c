"""Run by TRL 1.12's own interpreter: what its PPOTrainer makes of given rollouts. Writes losses and gradients of two updates.

    python trl_ppo_update.py DIRECTORY

reads DIRECTORY/model, critic, reference, job.json and writes DIRECTORY/trl.safetensors, `UPDATE.actor.NAME` and so on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

directory = Path(sys.argv[1])
job = json.loads((directory / "job.json").read_text())
prompts, replies = torch.tensor(job["prompts"]), torch.tensor(job["replies"])


def given(model, queries, _, pad_id, generation):
    """The replies of the job in place of samples, with the logits that the model has for them."""
    row_of = {tuple(prompt): row for row, prompt in enumerate(job["prompts"])}
    whole = torch.cat([queries, replies[[row_of[tuple(query)] for query in queries.tolist()]]], 1)
    with torch.no_grad():
        logits = model(whole).logits[:, queries.shape[1] - 1 : -1]
    return whole, logits / (generation.temperature + 1e-7)


ppo_trainer.batch_generation = given
tokenizer = AutoTokenizer.from_pretrained(directory / "model", padding_side="left")
critic = {"num_labels": 1}
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=str(directory / "trl"), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=len(prompts), total_episodes=len(prompts), num_ppo_epochs=2,
        lr_scheduler_type="constant",
        response_length=replies.shape[1], num_sample_generations=0, eval_strategy="no", **job["settings"],
    ),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(directory / "model"),
    ref_model=AutoModelForCausalLM.from_pretrained(directory / "reference"),
    reward_model=AutoModelForSequenceClassification.from_pretrained(directory / "critic", **critic),
    value_model=AutoModelForSequenceClassification.from_pretrained(directory / "critic", **critic),
    train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
    eval_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
)  # fmt: skip
found, backward = {}, trainer.accelerator.backward


def recorded(loss) -> None:
    update = len([name for name in found if name.endswith("loss")])
    backward(loss)
    model = trainer.accelerator.unwrap_model(trainer.model)
    found[f"{update}.loss"] = loss.detach()
    for part, module in (("actor", model.policy), ("critic", model.value_model)):
        found.update({f"{update}.{part}.{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})


trainer.accelerator.backward = recorded
trainer.train()
save_file(found, directory / "trl.safetensors")
