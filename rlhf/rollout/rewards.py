"""Where scores come from: reward models, a count of one token, or what reads text (readers.py); one of them, or several.

Every source maps replies to one number each, or to None: a reply that it has no score for. A reply that one of the sources has
no score for has none at all: nothing is learned from it (`Experience.kept`), as a number in its place would be a reward, too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.rewards import Scoring, kind_of
from rlhf.data.collate import Row, last_row, token_batch
from rlhf.data.examples import PromptExample
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.errors import CheckFailed, ConfigError, DataError
from rlhf.functional.rewards import combine_scores
from rlhf.models.roles import RewardModel
from rlhf.rollout.engines import Samples
from rlhf.rollout.functions import FunctionFailed
from rlhf.rollout.readers import Reader, checked_scores, read
from rlhf.rollout.services import NoAnswer


@dataclass(frozen=True)
class Scores:
    """Of B replies; NaN where there is none."""

    scores: Tensor
    """(B,) what the reward is"""
    kept: Tensor
    """(B,) whether there is a score"""
    components: dict[str, Tensor]
    """(B,) of each of several sources, by name, as it came; empty where there is but one"""

    def rows(self, indices: Sequence[int]) -> Scores:
        index = torch.as_tensor(list(indices), dtype=torch.long)
        components = {name: scores[index] for name, scores in self.components.items()}
        return Scores(self.scores[index], self.kept[index], components)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """One after the other."""
        components = {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components}
        return cls(torch.cat([part.scores for part in parts]), torch.cat([part.kept for part in parts]), components)


@dataclass(frozen=True)
class Replies:
    """What a source may look at."""

    asked: Sequence[PromptExample]
    tokens: Sequence[list[int]]
    texts: Sequence[str]
    """Without special tokens, and otherwise as they are."""
    finished: Sequence[bool]
    prompts: Sequence[list[int]]
    """Token ids."""

    def __len__(self) -> int:
        return len(self.tokens)


Source = Callable[[Replies], Sequence[float | None]]

SHORTER = "lower data.max_length or rollout.max_new_tokens"


def open_reward(
    config: Scoring,
    readers: Mapping[str, Reader],
    models: Mapping[str, RewardModel],
    template: Template | None,
    micro_batch_size: int,
    most: Callable[[int], int] = lambda count: count,
    told: Callable[[int, int], None] = lambda rows, tokens: None,
    advice: str = SHORTER,
) -> CombinedReward:
    """`most` gives the largest of a number over all ranks, which call a model that they divide equally often; `told` hears how
    many rows and tokens a model has just read.

    Args:
        template: of the policy; None where replies are texts, whose tokens nothing may then ask for.
        advice: what to do where a row has more tokens than a model has positions.
    """
    if template is None:
        _require_texts(config, readers)
    sources: dict[str, Source] = {}
    for name, part in config.parts.items():
        if name in readers:
            source = TextReward(readers[name], masks=config.on_failure == "mask" and kind_of(part.source) != "verifier")
        elif name in models:
            source = ModelReward(part.source, models[name], micro_batch_size, most, told, advice)
        else:
            assert template is not None
            source = CountReward(part.source.removeprefix("count:"), template.tokenizer)
        if part.minus_answer:
            assert template is not None
            source = MinusAnswer(source, part.answer, template)
        sources[name] = source
    return CombinedReward(config, sources, template and template.tokenizer)


def _require_texts(config: Scoring, readers: Mapping[str, Reader]) -> None:
    for name, part in config.parts.items():
        if part.minus_answer or kind_of(part.source) == "count" or "tokens" in getattr(readers.get(name), "takes", ()):
            what = "minus_answer" if part.minus_answer else part.source
            raise ConfigError(f"reward: {what} goes by the tokens of a policy, and these replies are texts; leave it out")


class CombinedReward:
    """(samples, what was asked) -> `Scores`, whatever the sources are."""

    def __init__(self, config: Scoring, sources: Mapping[str, Source], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.config, self.sources, self.tokenizer = config, sources, tokenizer

    def __call__(self, samples: Samples, asked: Sequence[PromptExample]) -> Scores:
        assert self.tokenizer is not None
        texts = [self.tokenizer.decode(response, skip_special_tokens=True) for response in samples.responses]
        return self.of(Replies(asked, samples.responses, texts, samples.finished, samples.prompts))  # pyright: ignore

    def of(self, replies: Replies) -> Scores:
        found = {name: source(replies) for name, source in self.sources.items()}
        kept = torch.tensor([all(score is not None for score in row) for row in zip(*found.values(), strict=True)])
        components = {name: torch.tensor([math.nan if s is None else s for s in scores]) for name, scores in found.items()}
        weights = torch.tensor([self.config.parts[name].weight for name in components])
        combined = combine_scores(torch.stack([*components.values()]), weights, self.config.combine, self.config.std_coef)
        return Scores(combined.masked_fill(~kept, math.nan), kept, components if self.config.sources else {})


class ModelReward:
    def __init__(
        self,
        name: str,
        model: RewardModel,
        micro_batch_size: int,
        most: Callable[[int], int] = lambda count: count,
        told: Callable[[int, int], None] = lambda rows, tokens: None,
        advice: str = SHORTER,
    ) -> None:
        self.name, self.model, self.micro_batch_size, self.most, self.told = name, model, micro_batch_size, most, told
        self.advice = advice

    def __call__(self, replies: Replies) -> list[float]:
        """Rows of like length are scored together."""
        rows = [self._row(replies, index) for index in range(len(replies))]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt) + len(rows[index].reply))
        device = next(self.model.model.parameters()).device
        scores = torch.zeros(len(rows))
        micro_batches = list(chunks(order, self.micro_batch_size))
        for number in range(self.most(len(micro_batches))):
            part = micro_batches[min(number, len(micro_batches) - 1)]  # the last once more, to keep ranks in step
            scores[part] = self.model.scores(token_batch(rows[index] for index in part).to(device)).float().cpu()
            self.told(len(part), sum(len(rows[index].prompt) + len(rows[index].reply) for index in part))
        return scores.tolist()

    def _row(self, replies: Replies, index: int) -> Row:
        template, asked = self.model.template, replies.asked[index]
        if template is None:
            row = last_row(replies.prompts[index], replies.tokens[index])
        else:
            row = read_again(template, asked, replies.texts[index], replies.finished[index])
        count, longest = len(row.prompt) + len(row.reply), self.model.positions
        if longest and count > longest:
            raise DataError(
                f"{asked.row.where}: with a reply it takes {count} positions of the reward model {self.name}, which has "
                f"{longest}: {self.advice}"
            )
        return row


def require_finite_scores(scores: Scores, asked: Sequence[PromptExample]) -> None:
    """Raises CheckFailed where a score that there is is no finite number."""
    wrong = (scores.kept & ~scores.scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise CheckFailed(
            f"{asked[wrong[0]].row.where}: the score of its reply is {float(scores.scores[wrong[0]])}; a reward must give "
            "numbers, or None for no score"
        )


def read_again(template: Template, asked: PromptExample, reply: str, finished: bool) -> Row:
    """A reply as another tokenizer has it; one that never ended has no end here either."""
    text = reply.strip() if template.chat else reply
    prompt, ids = template.response(asked.row.fields["prompt"], text, asked.row.where)
    return last_row(prompt, ids if finished else ids[:-1])


class CountReward:
    """How often a token occurs in a reply: a reward whose optimum is known."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = {i for i in range(len(tokenizer)) if tokenizer.decode([i]) == text}
        if not self.ids:
            raise DataError(f"reward count:{text}: no single token of this tokenizer reads {text!r}")

    def __call__(self, replies: Replies) -> list[float]:
        return [float(sum(token in self.ids for token in tokens)) for tokens in replies.tokens]


class TextReward:
    """A user's function, a verifier or a service: it is given prompts and replies as text.

    `masks`: where it fails on all tries, the replies it was asked for go without a score.
    """

    def __init__(self, reader: Reader, masks: bool) -> None:
        self.reader, self.masks = reader, masks

    def __call__(self, replies: Replies) -> list[float | None]:
        texts = [text.strip() for text in replies.texts]
        try:
            scores = read(self.reader, replies.asked, texts, tokens=replies.tokens, finished=replies.finished)
        except (FunctionFailed, NoAnswer) as failure:
            if not self.masks:
                raise
            print(f"rlhf: {failure}; {len(texts)} replies go without a score", file=sys.stderr, flush=True)
            return [None] * len(texts)
        return checked_scores(scores, len(texts), self.reader.source)


class MinusAnswer:
    """A source, less what it gives the answers of the rows: 0 is as good as the answer."""

    def __init__(self, source: Source, column: str, template: Template) -> None:
        self.source, self.column, self.template = source, column, template

    def __call__(self, replies: Replies) -> list[float | None]:
        """Each answer is scored once, however many replies it is compared with."""
        rows = {asked.index: asked for asked in replies.asked}
        scores = dict(zip(rows, self.source(self._answers([*rows.values()])), strict=True))
        against = [scores[asked.index] for asked in replies.asked]
        pairs = zip(self.source(replies), against, strict=True)
        return [None if own is None or other is None else own - other for own, other in pairs]

    def _answers(self, asked: Sequence[PromptExample]) -> Replies:
        texts = [prompt.row.others[self.column] for prompt in asked]
        for prompt, text in zip(asked, texts, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{prompt.row.where}: {self.column} is {type(text).__name__}, expected the text of a reply")
        fields = [(prompt.row.fields["prompt"], text, prompt.row.where) for prompt, text in zip(asked, texts, strict=True)]
        tokens = [self.template.response(*of)[1] for of in fields]
        return Replies(asked, tokens, texts, [True] * len(asked), [prompt.ids for prompt in asked])


def decode(responses: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]  # pyright: ignore
