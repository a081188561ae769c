"""Rollouts on disk: RUN/rollouts/step-N.safetensors, N as in metrics.jsonl, and a run that takes them instead of its own.

A file has what an iteration sampled and scored, padded at the right: `prompts` (B, P) with `prompt_lengths` (B,), and every
tensor of the experience by its name (experience.py). A replay takes the replies and their scores; log-probabilities and values
are computed again by the policy at hand, so the first ratio of its update is exactly 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config.policies import Rollout
from rlhf.config.rewards import Reward
from rlhf.data.collate import pad
from rlhf.data.examples import PromptExample
from rlhf.errors import DataError
from rlhf.paths import beside, sync
from rlhf.rollout.engines import Samples
from rlhf.rollout.experience import Experience
from rlhf.rollout.rewards import Scores
from rlhf.rollout.scoring import Scored

ROLLOUTS = "rollouts"
COMPONENT = "components."
"""Before the name of one of several sources of reward."""


class Recording:
    """What a run keeps of its rollouts, and what it takes from another's.

    Args:
        writes: whether this process is the one that writes.
        step_done: steps done before; files of later ones are of a run that went on from there, and go.

    Raises:
        DataError: the run to be replayed recorded nothing.
    """

    def __init__(self, run: Path, config: Rollout, reward: Reward, writes: bool, step_done: int) -> None:
        self.sources = reward.sources.keys()
        self.run, self.writes, self.longest = run, config.record and writes, config.max_new_tokens
        self.source = None if config.replay is None else Path(config.replay)
        if self.source is not None and not _recorded(self.source):
            raise DataError(f"rollout.replay {self.source}: no {ROLLOUTS}/step-1.safetensors there; name a run of --record")
        for step, file in _recorded(run).items() if self.writes else ():
            if step > step_done:
                file.unlink()

    def write(self, step: int, experience: Experience) -> None:
        """Keeps the experience of an iteration, counted from 0, as it was scored; the file appears complete or not at all."""
        if not self.writes:
            return
        prompts, mask = pad(experience.prompts, 0)
        tensors = {f.name: value for f in fields(experience) if isinstance(value := getattr(experience, f.name), Tensor)}
        file = _file(self.run, step)
        file.parent.mkdir(exist_ok=True)
        partial = beside(file)
        tensors |= {f"{COMPONENT}{name}": value for name, value in experience.components.items()}
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole | {"prompts": prompts, "prompt_lengths": mask.sum(1)}, partial, metadata={"format": "pt"})
        sync(partial)
        partial.replace(file)

    def read(self, step: int, asked: Sequence[PromptExample]) -> Scored | None:
        """The replies recorded in an iteration, counted from 0, to the prompts asked now; None where nothing is replayed.

        Raises:
            DataError: there is no such file, or it is none of ours; it answers other prompts; a reply is too long for this run.
        """
        if self.source is None:
            return None
        file = _file(self.source, step)
        if not file.is_file():
            known = max(_recorded(self.source))
            raise DataError(f"{file}: not there, the run recorded {known} iterations; set schedule.length to {known} at most")
        try:
            found = load_file(file)
            lengths, reply_lengths = found["prompt_lengths"].tolist(), found["mask"].sum(1).tolist()
            prompts = _rows(found["prompts"], lengths)
            samples = Samples(
                prompts,
                _rows(found["tokens"], reply_lengths),
                _rows(found["sampled_logprobs"], reply_lengths),
                found["finished"].tolist(),
                step,
            )
            components = {name.removeprefix(COMPONENT): value for name, value in found.items() if name.startswith(COMPONENT)}
            if components.keys() != self.sources:
                have, want = (", ".join(sorted(names)) or "one source" for names in (components, self.sources))
                raise DataError(f"{file}: holds scores of {have}, this run's reward is of {want}; give the same reward.sources")
            scored = Scored(samples, Scores(found["scores"], found["kept"], components))
        except (SafetensorError, KeyError) as error:
            raise DataError(f"{file}: no recorded rollout ({error})") from error
        advice = "a replay needs the data, the seed and the batch size of the run that was recorded"
        if len(prompts) != len(asked):
            raise DataError(f"{file}: holds {len(prompts)} replies, and this run asks for {len(asked)}; {advice}")
        for row, (recorded, prompt) in enumerate(zip(prompts, asked, strict=True)):
            if recorded != prompt.ids:
                raise DataError(f"{file}: reply {row} is to another prompt than {prompt.row.where}, asked now; {advice}")
        if max(reply_lengths) > self.longest:
            raise DataError(
                f"{file}: has a reply of {max(reply_lengths)} tokens; set rollout.max_new_tokens to that, it is {self.longest}"
            )
        return scored


def _recorded(run: Path) -> dict[int, Path]:
    """By step."""
    found = ((re.fullmatch(r"step-(\d+)\.safetensors", file.name), file) for file in (run / ROLLOUTS).glob("*"))
    return {int(match[1]): file for match, file in found if match}


def _file(run: Path, step: int) -> Path:
    return run / ROLLOUTS / f"step-{step + 1}.safetensors"


def _rows(padded: Tensor, lengths: Sequence[int]) -> list[list]:
    return [row[:length] for row, length in zip(padded.tolist(), lengths, strict=True)]
