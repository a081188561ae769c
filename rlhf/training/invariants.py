"""What must hold in the first iteration of any PPO run, in plain words.

Each check compares two things that must agree for a reason that has nothing to do with learning; one that fails names a bug or
a setting, not bad luck. The cheap ones run in every run (`first_scores`, `first_minibatch`); `probes.py` has the thorough ones
of the unit-test mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import PolicyStage, PpoConfig
from rlhf.data.collate import Row, token_batch
from rlhf.errors import CheckFailed
from rlhf.fp8.recipes import recipe_of
from rlhf.functional.masked import WHITENING_EPS, Moments
from rlhf.models.actor_critic import ActorCritic
from rlhf.rollout.experience import Experience
from rlhf.runs.explain import found, why_and_what

ROLLOUT_TOLERANCE = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 0.25}
"""Largest |difference| in nats between a decode with a KV cache and a forward over the whole reply, by precision."""
ROLLOUT_TOLERANCE_FP8, ROLLOUT_TOLERANCE_FP8_BY_BATCH = 0.05, 2.0
"""The same in FP8, where that is more: a difference in the last bit can turn a code into its neighbour, 6% away.
By batch: where scales follow from all rows together, too."""

COMPILED_TOLERANCE = 1e-4
"""In nats, as for a rollout: two ways to compute the same in float32."""

BATCH_MATES = 16
BATCH_MATES_TOLERANCE = 1e-2
"""In nats. On a CPU the difference is exactly 0; kernels that sum in another order for another batch turn single codes (at most
4e-3 seen), scales shared by all rows move every one (0.03 to 0.6 seen)."""


Probe = Callable[..., None]
"""(checks, training, roles, policy, experience, loss of some experience): more checks, for who asks (unit_test.py)"""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    measured: str
    meaning: str
    """What the check says when it holds; with `not` in front of it, what is wrong when it does not."""


@dataclass
class Checks:
    """Results in order; `require` turns a failure into the end of the run."""

    results: list[Check] = field(default_factory=list)
    told: int = 0
    """How many of them were said."""

    def expect(self, name: str, passed: bool | Tensor, measured: Any, meaning: str) -> None:
        text = f"{float(measured):.3g}" if isinstance(measured, (int, float, Tensor)) else str(measured)
        self.results.append(Check(name, bool(passed), text, meaning))

    def failed(self) -> list[Check]:
        return [check for check in self.results if not check.passed]

    def require(self, note: Callable[[str], None] | None = None) -> None:
        """Says each new result in a line, if asked to.

        Raises:
            CheckFailed: naming every check that does not hold, and what `rlhf explain` knows of it.
        """
        if note:
            for check in self.results[self.told :]:
                note(f"check {'ok' if check.passed else 'FAILED'}: {check.name}: {check.meaning} (measured {check.measured})")
        self.told = len(self.results)
        if failed := self.failed():
            lines = "\n".join(line for check in failed for line in _told_of(check))
            names = ", ".join(c.name for c in failed)
            raise CheckFailed(f"{len(failed)} of {len(self.results)} self-checks fail in the first iteration: {names}\n{lines}")


def _told_of(check: Check) -> list[str]:
    known = found(check.name)  # none of a check that a copied recipe brings
    first = f"  {check.name}: measured {check.measured}; it should be that {check.meaning}"
    return [first, *(f"    {line}" for line in (why_and_what(known) if known else ()))]


def first_scores(checks: Checks, experience: Experience, config: PolicyStage) -> None:
    """Checks on the first iteration's scored and credited experience, before any update."""
    mask = experience.mask.bool()
    tolerance = rollout_tolerance(config)
    difference = (experience.sampled_logprobs - experience.logprobs)[mask].abs().max()
    checks.expect(
        "rollout log-probs",
        difference <= tolerance,
        difference,
        f"sampling and scoring see the same policy (temperature, positions, mask), within {tolerance} nats a token",
    )
    if experience.reference_logprobs is not None and config.roles.reference in (None, config.roles.actor):
        distance = (experience.logprobs - experience.reference_logprobs)[mask].abs().max()
        # The compiler may order sums of a layer that keeps activations, or has adapters, in another way than of one without.
        within, words = (COMPILED_TOLERANCE, f"within {COMPILED_TOLERANCE}") if config.compile else (0.0, "exactly 0")
        meaning = f"the actor starts as the reference: max |log ratio| is {words}"
        checks.expect("KL at step 0", distance <= within, distance, meaning)
    outside = sum(float(x[~mask].abs().sum()) for x in _per_token(experience))
    checks.expect(
        "outside the mask",
        outside == 0,
        outside,
        "rewards, values, advantages and returns are 0 where no reply token is",
    )


def remarks(experience: Experience, config: PolicyStage) -> list[str]:
    """What is no failure of the first iteration, but may keep a run from learning, or let it learn the wrong thing."""
    found = []
    if isinstance(config, PpoConfig) and config.kl.coef == 0:
        found.append(
            "warning: kl.coef is 0: nothing holds the policy near its reference, and it may leave language for whatever the "
            "reward likes; watch policy/entropy and samples.jsonl"
        )
    if not experience.finished.any():
        made = {
            "replace": f"; every score is replaced by reward.missing_eos_value {config.reward.missing_eos_value:g}",
            "subtract": f"; every score is lowered by reward.missing_eos_value {config.reward.missing_eos_value:g}",
            "none": "",
        }[config.reward.missing_eos]
        found.append(
            f"warning: no reply ended within rollout.max_new_tokens {config.rollout.max_new_tokens}{made}. Either allow longer "
            "replies, or the actor never learned its end token: where that is the pad token, too, some trainers mask it, and "
            "rows that are cut off have none"
        )
    return found


def whitening(checks: Checks, experience: Experience, config: PpoConfig) -> None:
    """Check on the first iteration's advantages."""
    if config.ppo.whiten:
        assert experience.advantages is not None
        assert experience.returns is not None
        assert experience.values is not None
        moments = Moments.of(experience.advantages, experience.learned)
        variance = Moments.of(experience.returns - experience.values, experience.learned).variance
        expected = math.sqrt(variance / (variance + WHITENING_EPS))  # not 1 where there is next to nothing to whiten
        good = abs(moments.mean) < 1e-5 and abs(moments.std - expected) < 1e-3
        measured = f"mean {moments.mean:.1e}, std {moments.std:.4f}"
        checks.expect("whitening", good, measured, "advantages of all replies together have mean 0 and deviation 1")


@torch.no_grad()
def batch_mates(checks: Checks, policy: ActorCritic, experience: Experience, config: PolicyStage) -> str:
    """Whether FP8 makes a token's log-prob depend on the rows beside it: replies scored alone and together, no pads.

    A recipe that scales all rows together does; that is no failure but a warning, with what was measured.
    """
    whole = [prompt + reply for prompt, reply in zip(experience.prompts, experience.replies, strict=True)]
    rows = sorted(whole, key=len, reverse=True)[:BATCH_MATES]  # cut to one length, the longest tell most
    length = len(rows[-1])
    if len(rows) < 2 or length < 2:
        return f"fp8.recipe {config.fp8.recipe}: too few tokens to compare replies scored alone and together"
    device = next(policy.parameters()).device

    def logprobs(part: list[list[int]]) -> Tensor:
        batch = token_batch(Row([], row[:length], range(length - 1)) for row in part).to(device)
        found = policy(batch, roles=("actor",), temperature=config.rollout.temperature).logprobs
        assert found is not None
        return found

    apart = (logprobs(rows) - torch.cat([logprobs([row]) for row in rows])).abs()
    largest, recipe = apart.max(), config.fp8.recipe
    measured = f"{len(rows)} replies scored alone and together differ by {apart.mean():.1e} nats a token, at most {largest:.1e}"
    if recipe_of(config.fp8).batch_invariant:
        within = largest <= max(BATCH_MATES_TOLERANCE, ROLLOUT_TOLERANCE[config.precision])
        checks.expect("batch mates", within, largest, "a reply gets the same log-probs alone and beside others")
        return f"fp8.recipe {recipe}: {measured}"
    return (
        f"warning: fp8.recipe {recipe} scales all rows of a batch together: {measured}. The ratio of later epochs and the KL "
        "carry that as noise; block, rowwise, mxfp8 and delayed do not have it"
    )


def rollout_tolerance(config: PolicyStage) -> float:
    """Largest |difference| in nats a token between the log-probabilities of sampling and of scoring."""
    # A server has a precision of its own, and a replay may be of one.
    elsewhere = config.rollout.engine == "vllm" or config.rollout.replay
    plain = ROLLOUT_TOLERANCE["bf16" if elsewhere else config.precision]
    if config.fp8.recipe == "none":
        return plain
    invariant = recipe_of(config.fp8).batch_invariant
    return max(plain, ROLLOUT_TOLERANCE_FP8 if invariant else ROLLOUT_TOLERANCE_FP8_BY_BATCH)


def first_minibatch(checks: Checks, stats: Mapping[str, float]) -> None:
    """Checks on the first forward of the first update, which sees the weights the rollouts were scored with."""
    largest, clipped = stats["policy/max_abs_log_ratio"], stats["policy/clip_fraction"]
    checks.expect("first ratio", largest == 0, largest, "max |log ratio| of the first minibatch is exactly 0")
    if (moved := stats.get("value/max_abs_change")) is not None:
        checks.expect(
            "first values", moved == 0, moved, "the critic reads the same positions in scoring and update: values are equal"
        )
    checks.expect("first clip fraction", clipped == 0, clipped, "nothing is clipped in the first minibatch")


def _per_token(experience: Experience) -> list[Tensor]:
    found = (experience.rewards, experience.values, experience.advantages, experience.returns)
    return [x for x in found if x is not None]
