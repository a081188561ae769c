"""The loss of supervised fine-tuning.

Left out on purpose: the mean. The loss is a sum and comes with its count, and the caller divides once by the count over
all micro-batches and processes, so that neither of them changes the update.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.masked import masked_sum

IGNORED = -100
"""Label of a token that is not trained on; the value every Hugging Face collator writes."""


def sft_loss(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"]) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Sum of -log p over the labels that are not -100, and their number.

    Labels are aligned with the input tokens: the logits at t predict the label at t + 1, and the shift is done here.
    """
    predicted, targets = logits[:, :-1], labels[:, 1:]
    trained = targets != IGNORED
    logprobs = token_logprobs(predicted, torch.where(trained, targets, 0))
    return -masked_sum(logprobs, trained), trained.sum()
