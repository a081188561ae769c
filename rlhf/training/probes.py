"""The thorough checks of `rlhf ppo --unit-test`, made once on the first iteration's experience, before any update.

Where it can, a probe computes a number again by another way: one reply at a time, without pads, mask or position ids, through
plain transformers. What agrees with that is right for a reason other than having been computed by the same code twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from rlhf.config.schema import PpoConfig
from rlhf.data.order import chunks
from rlhf.functional.kl import ESTIMATORS
from rlhf.models.actor_critic import ActorCritic, unwrapped
from rlhf.models.heads import HEAD
from rlhf.rollout.credit import RunningScores, credit, shaped_scores
from rlhf.rollout.experience import Experience
from rlhf.training.invariants import Checks

GARBAGE = 1e6
PROBED_ROWS = 8
"""Replies that are computed again one by one."""


def probe_forward(checks: Checks, policy: ActorCritic, experience: Experience, temperature: float) -> None:
    """Log-probabilities and values against plain forwards of single replies."""
    largest, largest_value = 0.0, 0.0
    assert experience.values is not None
    for row in range(min(PROBED_ROWS, len(experience))):
        reply = experience.tokens[row][experience.mask[row].bool()]
        ids = torch.cat([torch.tensor(experience.prompts[row]), reply])[None].to(next(policy.parameters()).device)
        before = slice(len(experience.prompts[row]) - 1, ids.shape[1] - 1)  # the positions that predict the reply
        with torch.no_grad():
            output = unwrapped(policy.actor)(ids, output_hidden_states=True)  # pyright: ignore[reportArgumentType]
            logits = output.logits[0, before].float().cpu() / temperature
            values = _plain_values(policy, ids, output.hidden_states[-1])[0, before].cpu()
        expected = logits.log_softmax(-1).gather(1, reply[:, None]).squeeze(1)
        largest = max(largest, float((expected - experience.logprobs[row, : len(reply)]).abs().max()))
        largest_value = max(largest_value, float((values - experience.values[row, : len(reply)]).abs().max()))
    checks.expect(
        "plain log-probs",
        largest < 1e-4,
        largest,
        "replies scored one by one, without pads, masks or position ids, get the same log-probs",
    )
    checks.expect(
        "plain values", largest_value < 1e-4, largest_value, "V_t is the critic's output at the position before token t"
    )


def probe_dropout(checks: Checks, policy: nn.Module, experience: Experience, device: torch.device) -> None:
    batch = experience.rows(range(min(PROBED_ROWS, len(experience)))).batch().to(device)
    with torch.no_grad():
        first, second = policy(batch).logprobs, policy(batch).logprobs
    difference = (first - second).abs().max()
    checks.expect("dropout", difference == 0, difference, "two forwards of the same batch are equal: dropout is off")


def probe_credit(checks: Checks, experience: Experience, config: PpoConfig) -> None:
    """Where the score sits, and which way the KL term pushes."""
    assert experience.rewards is not None
    scores = shaped_scores(experience, config.reward, RunningScores())
    lengths = experience.mask.sum(1)
    expected = torch.zeros_like(experience.rewards)
    last, reference = (torch.arange(len(scores)), lengths - 1), experience.reference_logprobs
    expected[last] = scores
    if reference is not None and config.kl.place != "loss":
        penalties = config.kl.coef * ESTIMATORS[config.kl.estimator](experience.logprobs, reference) * experience.mask
        if config.kl.place == "tokens":
            expected -= penalties
        else:
            expected[last] -= penalties.sum(1)
    difference = (experience.rewards - expected).abs().max()
    checks.expect(
        "score placement",
        difference < 1e-5,
        difference,
        "the score is added at the last token of each reply, nowhere else",
    )
    if reference is not None and config.kl.place != "loss":
        nearer = replace(experience, reference_logprobs=reference - 0.1 * experience.mask)
        total = float(credit(nearer, config, config.kl.coef, RunningScores())[0].rewards.sum() - experience.rewards.sum())  # pyright: ignore
        checks.expect("KL penalty", total < 0, total, "tokens likelier than under the reference lower the reward")


def probe_loss(
    checks: Checks, experience: Experience, loss_of: Callable[[Experience], Tensor], parameters: Iterable[nn.Parameter]
) -> None:
    """Pads and micro-batching must not reach the loss."""
    rows = experience.rows(range(min(2 * PROBED_ROWS, len(experience))))
    rows = rows.weighed(range(len(rows)), "tokens", longest=1)
    plain = float(loss_of(rows).detach())
    outside = ~rows.mask.bool()
    fields = ("logprobs", "values", "rewards", "advantages", "returns")
    spoiled = [{name: getattr(rows, name).masked_fill(outside, value) for name in fields} for value in (GARBAGE, -GARBAGE)]
    differences = [loss_of(replace(rows, **changes)).detach() - plain for changes in spoiled]
    difference = torch.stack(differences).abs().max()  # NaN if one of them is, which Python's max would pass over
    checks.expect(
        "pads",
        difference < 1e-6,
        difference,
        f"what stands at pads does not matter: +-{GARBAGE:.0e} there leaves the loss as it is",
    )
    losses = {}
    gradients = {}
    parameters = [p for p in parameters if p.requires_grad]
    for size in (1, 4):
        parts = [rows.rows(micro) for micro in chunks(range(len(rows)), size)]
        total = torch.stack([loss_of(part) for part in parts]).sum()
        losses[size] = float(total.detach())
        gradients[size] = torch.cat(
            [g.flatten() for g in torch.autograd.grad(total, parameters, allow_unused=True) if g is not None]
        )
    difference = abs(losses[1] - losses[4]) + float((gradients[1] - gradients[4]).abs().max())
    checks.expect("micro-batches", difference < 1e-5, difference, "micro-batches of 1 and of 4 give the same loss and gradient")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_values(policy: ActorCritic, ids: Tensor, actor_hidden: Tensor) -> Tensor:
    if policy.value_head is not None:
        return policy.value_head(actor_hidden).squeeze(-1)
    critic = policy.part("critic")
    assert critic is not None
    inner = unwrapped(critic)
    with policy.active("critic"):
        hidden = getattr(inner, inner.base_model_prefix)(ids).last_hidden_state  # pyright: ignore
    return getattr(critic, HEAD)(hidden).squeeze(-1)
