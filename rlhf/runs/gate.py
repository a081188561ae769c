"""Whether a reward model may be optimised against: what its own run found out on held-out pairs."""

from __future__ import annotations

from rlhf.config.rewards import Scoring
from rlhf.errors import CheckFailed
from rlhf.runs.lineage import run_of
from rlhf.runs.manifest import MANIFEST, read_json


def reward_gate(reward: Scoring) -> list[str]:
    """A note for each reward model of a run of `rlhf rm` that was not evaluated; one from elsewhere is taken as it is.

    Raises:
        CheckFailed: the held-out accuracy of one is not above chance, by its 95% interval.
    """
    return [note for source in reward.models.values() if reward.gate and (note := _judged(source))]


def _judged(source: str) -> str | None:
    run = run_of(source)
    manifest = read_json(run / MANIFEST) if run is not None else {}
    if manifest.get("stage") != "rm":
        return None
    found = manifest["result"]
    if "eval/accuracy_low" not in found:
        return f"warning: the reward model {source} was not evaluated on held-out pairs: give `rlhf rm` --data.eval"
    low, high = found["eval/accuracy_low"], found["eval/accuracy_high"]
    if low > 0.5:
        return None
    if high < 0.5:
        raise CheckFailed(
            f"reward.source {source}: prefers the worse replies: held-out accuracy {found['eval/accuracy']:.3f} "
            f"(95%: {low:.3f} to {high:.3f}). `chosen` and `rejected` are exchanged in the pairs it was trained on, or in "
            "those it was evaluated on; look with rlhf data preview. To go on all the same: --reward.gate false"
        )
    raise CheckFailed(
        f"reward.source {source}: no better than a coin at telling good replies from bad ones: held-out accuracy "
        f"{found['eval/accuracy']:.3f} (95%: {low:.3f} to {high:.3f}). Train it on more or cleaner pairs, or evaluate it on "
        "more of them; to go on all the same: --reward.gate false"
    )
