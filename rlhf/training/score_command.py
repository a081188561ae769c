"""`rlhf score`: what a reward gives the replies of a file, a row for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch

from rlhf.config.commands import ScoreConfig
from rlhf.config.parse import Invocation
from rlhf.data.examples import PromptExample
from rlhf.data.order import chunks
from rlhf.data.rows import Row, first_columns, read_rows
from rlhf.data.templates import Messages, Template
from rlhf.errors import CheckFailed, DataError
from rlhf.functional.preference import accuracy, wilson_interval
from rlhf.models.roles import RewardModel, open_reward_model, positions
from rlhf.report.console import Console
from rlhf.rollout.readers import AT_ONCE, columns_asked, open_readers_of, require_answers
from rlhf.rollout.rewards import CombinedReward, Replies, open_reward
from rlhf.runs.gate import reward_gate
from rlhf.training.evaluation.replies import counted_scores
from rlhf.training.output_file import require_new, write

SIDES = ("chosen", "rejected")
Dialogue = str | Messages


class Scored(NamedTuple):
    """A reply of a row; `name` is that of its column in the output."""

    name: str
    asked: PromptExample
    text: str
    finished: bool


def score(invocation: Invocation[ScoreConfig]) -> int:
    config, console, output = invocation.config, Console("score", speak=True), require_new(invocation.config.output)
    for note in reward_gate(config.reward):
        console.note(note)
    data = config.data
    readers = open_readers_of(config.reward, [data.file], data.max_line_bytes)
    rows = _read(config, columns_asked(config.reward, readers.values()), console)
    replies = [reply for index, row in enumerate(rows) for reply in replies_of(row, index)]
    require_answers(readers.values(), [reply.asked for reply in replies])
    models = {name: _open(spec, config) for name, spec in config.reward.models.items()}
    count = counted_scores(config.reward, models, len(replies), console)
    reward = open_reward(config.reward, readers, models, None, config.batch_size, told=count.add)
    lines: list[dict[str, Any]] = [{**row.fields, **row.others} for row in rows]
    with closing(console):
        for part in chunks(replies, AT_ONCE):  # a call of a function or a service has a deadline
            for reply, found in zip(part, _scores(reward, config.reward.weight, part), strict=True):
                side = reply.name.removeprefix("score")
                lines[reply.asked.index] |= {reply.name: found[0], **({f"scores{side}": found[1]} if found[1] else {})}
            count.add(0 if models else len(part))
    write(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = {"output": str(output), "rows": len(lines), **summary(lines, replies)}
    print(json.dumps(result, indent=2) if invocation.as_json else described(result))
    return 0


def replies_of(row: Row, index: int) -> list[Scored]:
    """What is scored of a row: all but the last message of the assistant is its prompt.

    Raises:
        DataError: the row is a text, or its chat does not end with a reply.
    """
    fields = row.fields
    if "text" in fields:
        raise DataError(f"{row.where}: is a text; expected messages, a prompt with its completion, or with chosen and rejected")
    if "messages" in fields:
        *before, last = fields["messages"]
        if last["role"] != "assistant" or not before:
            raise DataError(f"{row.where}: messages must ask something and end with the assistant's reply, which is scored")
        named: dict[str, tuple[Dialogue, Dialogue]] = {"score": (before, last["content"])}
    elif "chosen" in fields:
        named = {f"score_{side}": (fields["prompt"], fields[side]) for side in SIDES}
    else:
        named = {"score": (fields["prompt"], fields["completion"])}
    found = []
    finished = row.others.get("finished", True) is not False  # as `rlhf generate` writes it
    for name, (prompt, reply) in named.items():
        if name in row.others:
            raise DataError(f"{row.where}: has a column {name!r}, which is the name of one that is written; rename it")
        if not isinstance(reply, str):
            assert not isinstance(prompt, str)
            prompt, reply = [*prompt, *reply[:-1]], reply[-1]["content"]
        found.append(Scored(name, PromptExample(index, [], Row(row.where, {"prompt": prompt}, row.others)), reply, finished))
    return found


def summary(lines: Sequence[dict[str, Any]], replies: Sequence[Scored]) -> dict[str, Any]:
    """Moments of the scores there are; of pairs, how often the chosen reply has the higher one, with Wilson's 95% interval."""
    scores = [score for reply in replies if (score := lines[reply.asked.index][reply.name]) is not None]
    found: dict[str, Any] = {"replies": len(replies), "scored": len(scores)}
    if scores:
        of = torch.tensor(scores, dtype=torch.float64)
        found |= {"mean": float(of.mean()), "deviation": float(of.std(correction=0))}
        found |= {"least": float(of.min()), "most": float(of.max())}
    pairs = [pair for line in lines if None not in (pair := tuple(line.get(f"score_{side}") for side in SIDES))]
    if pairs:
        right = float(accuracy(*torch.tensor(pairs, dtype=torch.float64).T).sum())
        low, high = wilson_interval(right, len(pairs))
        found |= {"pairs": len(pairs), "accuracy": right / len(pairs), "accuracy_low": low, "accuracy_high": high}
    return found


def described(result: dict[str, Any]) -> str:
    left = f", {missing} without a score" if (missing := result["replies"] - result["scored"]) else ""
    text = f"score  {result['replies']} replies of {result['rows']} rows: {result['output']}{left}"
    if "mean" in result:
        text += "\nmean {mean:.4f}, deviation {deviation:.4f}, {least:.4f} to {most:.4f}".format(**result)
    if "pairs" in result:
        interval = "95%: {accuracy_low:.3f} to {accuracy_high:.3f}, {pairs} pairs".format(**result)
        text += f"\nthe chosen reply scores higher in {result['accuracy']:.3f} ({interval})"
    return text


def _read(config: ScoreConfig, asked: dict[str, str], console: Console) -> list[Row]:
    data = config.data
    is_pair = data.columns.get("chosen", "chosen") in first_columns(data.file, data.max_line_bytes)
    found = read_rows(
        data.file,
        "pair" if is_pair else "sft",
        columns=data.columns,
        extra_columns=data.extra_columns,
        asked=asked,
        on_error=data.on_error,
        max_skip_fraction=data.max_skip_fraction,
        max_line_bytes=data.max_line_bytes,
    )
    for note in found.notes:
        console.note(note)
    return found.rows


def _open(spec: str, config: ScoreConfig) -> RewardModel:
    """A model that reads texts with its own tokenizer."""
    roles = open_reward_model(spec, config.trust_remote_code)
    template = Template(roles.tokenizer, config.data.template, roles.stop_ids)
    return RewardModel(roles.policy, "critic", positions(roles.policy), template)


def _scores(
    reward: CombinedReward, weight: float, part: Sequence[Scored]
) -> list[tuple[float | None, dict[str, float | None]]]:
    """Of each reply the score, None where it has none, and those of the sources where there are several."""
    none: list[list[int]] = [[] for _ in part]
    asked, texts, finished = [reply.asked for reply in part], [reply.text for reply in part], [reply.finished for reply in part]
    scores = reward.of(Replies(asked, none, texts, finished, none))
    found = []
    for at, reply in enumerate(part):
        values = {name: float(column[at]) for name, column in scores.components.items()}
        total = weight * float(scores.scores[at]) if scores.kept[at] else None
        if total is not None and not math.isfinite(total):
            raise CheckFailed(
                f"{reply.asked.row.where}: the score is {total}; a reward must give numbers, or None for no score"
            )
        found.append((total, {name: None if math.isnan(value) else value for name, value in values.items()}))
    return found
