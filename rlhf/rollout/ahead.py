"""The next iteration's replies, sampled while this one's update runs: by the weights before it, so one update stale.

Only an engine can that has weights and devices of its own, a server. Importance weights (rlhf/functional/importance.py) make up
for the difference between the policy that sampled and the one that is updated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from rlhf.data.examples import PromptExample
from rlhf.data.order import share
from rlhf.rollout.engines import Engine, Samples
from rlhf.rollout.sampling import Sampling


class Ahead:
    """Replies asked for ahead of their iteration; part of a training checkpoint, as the weights that sampled them are gone.

    Args:
        gather: the value of every rank, in their order.
    """

    def __init__(self, rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> None:
        self.rank, self.world_size, self.gather = rank, world_size, gather
        self.asking = ThreadPoolExecutor(max_workers=1)
        self.begun: tuple[int, Future[Samples]] | None = None
        self.ready: tuple[int, Samples] | None = None

    def begin(
        self, engine: Engine, step: int, asked: Sequence[PromptExample], row_seeds: Sequence[int], sampling: Sampling
    ) -> None:
        """Asks for this rank's share of the replies of an iteration, and does not wait for them."""
        prompts = [prompt.ids for prompt in asked]
        mine = share(prompts, self.rank, self.world_size), sampling, share(row_seeds, self.rank, self.world_size)
        self.begun = step, self.asking.submit(engine.generate, *mine)

    def finish(self) -> None:
        """Waits for what was begun, on all ranks: the engine may have other weights now."""
        if self.begun is None:
            return
        (step, asked), self.begun = self.begun, None
        parts = self.gather(asked.result())
        places = [(place, rank) for rank, part in enumerate(parts) for place in range(len(part))]
        joined = Samples.joined(parts)
        # Rank r has every world_size-th reply, from the r-th on.
        self.ready = step, joined.rows(sorted(range(len(joined)), key=lambda row: places[row]))

    def take(self, step: int) -> Samples | None:
        """All replies of an iteration, if they were asked for ahead."""
        if self.ready is None or self.ready[0] != step:
            return None
        (_, samples), self.ready = self.ready, None
        return samples

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ready is None else {"step": self.ready[0], "samples": asdict(self.ready[1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ready = (state["step"], Samples(**state["samples"])) if state else None
