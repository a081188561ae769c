"""A policy of TRL's on held-out prompts of the chat world: sampled at temperature 1, judged by the world's exact scorer.

With their KL from the reference as our own evaluation takes it: nats a reply, the sum of log pi - log pi_ref.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _trainer import prompt_ids
from trl.experimental.ppo.ppo_trainer import forward

from rlhf.data.chat_world import judge


@torch.no_grad()
def evaluate(
    policy: Any, reference: Any, tokenizer: Any, prompts: Sequence[str], samples: int, reply_tokens: int, rows: int = 256
) -> dict[str, float]:
    asked = list(prompts) * samples
    responses, kl = [], []
    policy.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(asked))
        for start in range(0, len(asked), rows):
            texts, more = sampled(policy, reference, tokenizer, asked[start : start + rows], reply_tokens)
            responses += texts
            kl += more
    policy.train()
    metrics = {name: sum(column) / len(column) for name, column in judge(asked, responses).items()}
    return metrics | {"kl": sum(kl) / len(kl)}


def sampled(
    policy: Any, reference: Any, tokenizer: Any, asked: Sequence[str], reply_tokens: int
) -> tuple[list[str], list[float]]:
    """(replies, KL of each)"""
    batch = tokenizer.pad({"input_ids": [prompt_ids(tokenizer, text) for text in asked]}, return_tensors="pt")
    full = policy.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=reply_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    width = batch["input_ids"].shape[1]
    replies = full[:, width:]
    ends = replies == tokenizer.eos_token_id
    real = (ends.cumsum(1) - ends.int()) == 0

    def logprobs(model: Any) -> torch.Tensor:
        logits = forward(model, full, tokenizer.pad_token_id).logits[:, width - 1 : -1]
        return logits.log_softmax(-1).gather(2, replies[..., None]).squeeze(2)

    kl = ((logprobs(policy) - logprobs(reference)) * real).sum(1)
    return tokenizer.batch_decode(replies, skip_special_tokens=True), kl.tolist()
