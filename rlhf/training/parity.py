"""Does a rollout engine sample the policy that is trained? Asked each time one starts, of a few greedy replies.

The reference is a plain forward over prompt and reply, no cache and no batch: at each place the engine's token must be the
likeliest, with the log-probability that the engine gave it. The native engine is left out: in the first iteration all of its
rollouts are held to the forward of the update (invariants.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rlhf.config.schema import PolicyStage
from rlhf.errors import CheckFailed
from rlhf.rollout.engines import Engine, Run
from rlhf.rollout.sampling import Sampling
from rlhf.training.invariants import rollout_tolerance

PROMPTS, LONGEST = 4, 32
"""How many prompts, and how many tokens of each reply."""


@torch.no_grad()
def require_parity(engine: Engine, policy: nn.Module, prompts: Sequence[list[int]], config: PolicyStage, run: Run) -> None:
    """Compares the first of the prompts, and notes how close the engine came.

    A token that is not the likeliest passes as a near-tie where the two logits are no further apart than twice the tolerance:
    each may be off by it.

    Raises:
        CheckFailed: another token, or a log-probability further away than sampling and scoring may be.
    """
    if config.rollout.engine == "native":
        return
    tolerance = rollout_tolerance(config)
    asked, sampling = list(prompts[:PROMPTS]), Sampling(min(LONGEST, config.rollout.max_new_tokens), temperature=0.0)
    samples = engine.generate(asked, sampling, row_seeds=range(len(asked)))
    near_ties, largest = 0, 0.0
    with run.gathered(policy) as plain:
        plain.eval()
        for row, (prompt, reply, logprobs) in enumerate(zip(asked, samples.responses, samples.logprobs, strict=True)):
            ids = torch.tensor([prompt + reply], device=next(plain.actor.parameters()).device)
            logits = plain.actor(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
            for place, (token, logprob) in enumerate(zip(reply, logprobs, strict=True)):
                best, own = int(expected[place].argmax()), float(expected[place, token])
                gap, apart = float(expected[place, best]) - own, abs(logprob - own)
                if gap > 2 * tolerance or not apart <= tolerance:
                    raise CheckFailed(
                        f"rollout.engine {config.rollout.engine} does not sample the policy that is trained. Greedy reply to "
                        f"prompt {row}, token {place}: the engine took {token} with log-prob {logprob:.4f}; by a forward it "
                        f"has {own:.4f}, and the likeliest is {best} with {own + gap:.4f} (tolerance {tolerance} nats). It "
                        "has other weights, or another temperature, other positions, a coarser precision"
                    )
                near_ties, largest = near_ties + (token != best), max(largest, apart)
        plain.train()
    run.note(
        f"rollout engine {config.rollout.engine}: {sum(map(len, samples.responses))} greedy tokens of {len(asked)} prompts are "
        f"those of a forward, {near_ties} near-ties aside; log-probs within {largest:.1e} nats"
    )
