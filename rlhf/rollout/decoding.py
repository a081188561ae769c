"""Replies in the making: a token for each at every step of the model, while some leave and others join."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf.models.actor_critic import unwrapped
from rlhf.rollout.cache import BatchCache, SlotCache, cache_for
from rlhf.rollout.sampling import Sampling, sample

REFILL = 4
"""Prompts wait until one slot in so many is free, and then join together: one by one they cost more."""


@dataclass(eq=False)
class Reply:
    """Equal to itself alone, so that what is known of one can be kept by it while rows come and go."""

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


Step = Callable[[Sequence[Reply], Tensor], Tensor]
"""(B replies so far, logits (B, V) of the next token) -> logits (B, V); each live reply comes once a token."""


def complete(
    actor: nn.Module,
    replies: list[Reply],
    sampling: Sampling,
    stop_ids: frozenset[int],
    pad_id: int,
    slots: int,
    steps: Sequence[Step] = (),
    told: Callable[[Reply], None] | None = None,
) -> None:
    """Fills in tokens, up to the first stop token, and their log-probabilities; prompts join by length, the shortest first.

    Args:
        steps: change logits, one after the other, before a token is drawn; log-probabilities are of what they leave.
        told: is given each reply whenever it has one more token.
    """
    waiting = deque(sorted(replies, key=lambda reply: len(reply.prompt)))
    rows = Rows(actor, min(slots, len(replies)), sampling.max_new_tokens, pad_id)
    drawn: list[tuple[list[Reply], Tensor]] = []
    while waiting or rows.replies:
        logits = [rows.next_logits()] if rows.replies else []
        logits += rows.refill(waiting)
        scores = torch.cat(logits)
        for step in steps:
            scores = step(rows.replies, scores)
        tokens, logprobs = sample(scores, sampling, rows.seeds, rows.clock - rows.joined)
        drawn.append((rows.replies, logprobs))
        going_on = []
        for reply, token in zip(rows.replies, tokens.tolist(), strict=True):
            reply.tokens.append(token)
            if told is not None:
                told(reply)
            going_on.append(token not in stop_ids and len(reply.tokens) < sampling.max_new_tokens)
        rows.keep(going_on, tokens)
    for replies_then, logprobs in drawn:  # not sooner: a device would be waited for once more at every token
        for reply, logprob in zip(replies_then, logprobs.tolist(), strict=True):
            reply.logprobs.append(logprob)


class Rows:
    """The live rows of a cache. A clock counts columns; each row's tokens stand in those before it, the newest last."""

    seeds: Tensor
    """(rows,)"""
    starts: Tensor
    """(rows,) column of the first token"""
    joined: Tensor
    """(rows,) column of the first token of the reply"""

    def __init__(self, actor: nn.Module, slots: int, longest_reply: int, pad_id: int) -> None:
        self.actor, self.slots, self.pad_id, self.clock = actor, slots, pad_id, 0
        self.device = next(actor.parameters()).device
        self.replies: list[Reply] = []
        self.columns: list[tuple[int, int]] = []
        """Of each row, `starts` and `joined`."""
        self.tokens = torch.empty(0, dtype=torch.long, device=self.device)
        """(rows,) sampled, but not yet seen by the model"""
        self.cache = cache_for(unwrapped(actor), slots, longest_reply)

    def next_logits(self) -> Tensor:
        """(rows, V) after one more token of each row."""
        columns = torch.arange(self.clock - self.cache.width, self.clock + 1, device=self.device)
        logits = self._logits(self.tokens[:, None], columns, self.starts, self.cache)
        self.cache.advance()
        self.clock += 1
        return logits

    def refill(self, waiting: deque[Reply]) -> list[Tensor]:
        """Lets prompts join if there is room enough; of each group of them the logits (rows, V) after its last tokens."""
        logits = []
        if self.cache.free() >= min(len(waiting), max(1, self.slots // REFILL)):
            while waiting and self.cache.free():
                group = [waiting.popleft()]
                while waiting and len(group) < self.cache.free() and self._fit(group[0], waiting[0]):
                    group.append(waiting.popleft())
                logits.append(self._join(group))
        return logits

    def keep(self, going_on: list[bool], tokens: Tensor) -> None:
        """The rows that go on, with what was sampled for each; the last of them move to where others have left."""
        self.tokens = tokens
        if all(going_on):
            return
        count = sum(going_on)
        order, last = list(range(count)), [row for row in range(count, len(going_on)) if going_on[row]]
        for hole in range(count):
            if not going_on[hole]:
                order[hole] = last.pop()
        self.tokens = tokens[order]
        self.replies, self.columns = [self.replies[row] for row in order], [self.columns[row] for row in order]
        self._tell()
        self.cache.keep(order, max((self.clock - start for start, _ in self.columns), default=0))

    def _fit(self, one: Reply, other: Reply) -> bool:
        """Prompts of one length need no pads; where rows cannot join later, all do at once."""
        return len(one.prompt) == len(other.prompt) or isinstance(self.cache, BatchCache)

    def _join(self, group: list[Reply]) -> Tensor:
        length, count = max(len(reply.prompt) for reply in group), len(group)
        ids = [[self.pad_id] * (length - len(reply.prompt)) + reply.prompt for reply in group]
        self.replies = self.replies + group
        self.columns += [(self.clock - len(reply.prompt), self.clock) for reply in group]
        self._tell()
        columns = torch.arange(self.clock - length, self.clock, device=self.device)
        prompts = DynamicCache(config=unwrapped(self.actor).config)  # pyright: ignore[reportArgumentType]
        logits = self._logits(torch.tensor(ids, device=self.device), columns, self.starts[-count:], prompts)
        self.cache.join(prompts, count, length)
        return logits

    def _tell(self) -> None:
        rows = [(reply.seed, *columns) for reply, columns in zip(self.replies, self.columns, strict=True)]
        self.seeds, self.starts, self.joined = torch.tensor(rows, device=self.device).reshape(-1, 3).T

    def _logits(self, ids: Tensor, columns: Tensor, starts: Tensor, cache: SlotCache | DynamicCache) -> Tensor:
        """After the ids (rows, tokens), which stand in the last of the columns that a row attends to."""
        places = columns - starts[:, None]
        return self.actor(
            input_ids=ids,
            attention_mask=(places >= 0).long(),
            position_ids=places[:, -ids.shape[1] :].clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
