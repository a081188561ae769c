"""Which figures of a run that samples are an alarm. Rules on medians, so that no single iteration raises one.

A rule gets the history of the figures and the limits of the config; it says by how much a limit is passed, and in words what
was seen. Left out: when an alarm is said, and what follows from it (training/alarms.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from rlhf.config.policies import Alarms
from rlhf.functional.preference import wilson_interval

KL_PER_TOKEN = 0.5
"""Nats: half the entropy that a small language model has left at a token. Published runs stay below: 6 nats for 24 tokens is
the target of Ziegler et al. 2019."""
LENGTH_LEFT = 0.2
"""Of the mean length at the start; below it replies end at once."""
LENGTH_CORRELATION = 0.5
"""Pearson's, of score and length, over the replies of an iteration: fewer than the pairs of a reward model, of which the
report is stricter."""
RATE_MOVES = 1e-6
"""Relative; less is rounding."""
FALLS_IN_A_ROW = 3
"""Of the gold metric. By chance four values stand in falling order once in 24 times."""
LARGEST = 1e6
"""Of a severity: where what is left is 0, JSON has no word for it."""

RATE = "optimizer/lr"
WATCHED = (
    "kl/sequence",
    "policy/entropy",
    "reward/length_correlation",
    "reward/score",
    "rollout/count",
    "rollout/distinct",
    "rollout/ended",
    "rollout/length",
    "rollout/repeated",
    "value/explained_variance",
)


@dataclass
class History:
    """The first values of each figure and its latest; JSON, as `asdict` has it."""

    window: int
    """May be another one when a run goes on; what was first stays so."""
    first: dict[str, list[float]] = field(default_factory=dict)
    """At most `window`, or what of so many was remembered."""
    latest: dict[str, list[float]] = field(default_factory=dict)
    """At most twice as many; the first ones are among them at first."""
    count: dict[str, int] = field(default_factory=dict)
    """Of all values that there were."""
    missing: dict[str, int] = field(default_factory=dict)
    """Iterations since a figure came: one that needs a score has no value where no reply has one."""
    rate: float | None = None
    """The latest learning rate."""
    lowest_rate: float | None = None
    """Since the warm-up ended."""
    gold: str | None = None
    """The metric of the evaluations."""
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    """(score, gold) of the latest ones, on held-out prompts."""
    evaluated: int | None = None
    """Iterations before the latest of them."""

    def see(self, values: Mapping[str, float], warmed_up: bool) -> None:
        """An iteration. `warmed_up`: its learning rate is not one of the warm-up."""
        for name in WATCHED:
            if (value := values.get(name)) is None:
                self.missing[name] = self.missing.get(name, 0) + 1
                continue
            self.missing[name] = 0
            before = self.latest.get(name, [])
            self.count[name] = self.count.get(name, len(before)) + 1
            latest = self.latest[name] = [*before, value][-2 * self.window :]
            if self.count[name] == len(latest):  # later ones are not of the start, however long the window has become
                self.first[name] = latest[: self.window]
        self.rate = values.get(RATE, self.rate)
        if self.rate is not None and (warmed_up or self.lowest_rate is not None):
            self.lowest_rate = self.rate if self.lowest_rate is None else min(self.rate, self.lowest_rate)

    def see_evaluation(self, step: int, score: float, name: str, gold: float) -> bool:
        """Of the weights after `step` iterations; `gold` is the metric of that name. False: it was seen before."""
        if name != self.gold:  # two metrics are no series
            self.gold, self.evaluations, self.evaluated = name, [], None
        if step == self.evaluated:
            return False
        self.evaluations, self.evaluated = [*self.evaluations, (score, gold)][-1 - FALLS_IN_A_ROW :], step
        return True

    def now(self, name: str) -> float | None:
        """Median of the latest `window` values; None while there are fewer, and where none came in so many iterations."""
        latest = self.latest.get(name, [])[-self.window :]
        there = len(latest) == self.window and self.missing.get(name, 0) < self.window
        return median(latest) if there else None

    def change(self, name: str) -> tuple[float, float] | None:
        """(median of the first, of the latest); None while they have values in common."""
        now, apart = self.now(name), len(self.latest.get(name, [])) >= 2 * self.window
        return (median(self.first[name][: self.window]), now) if apart and now is not None else None


@dataclass(frozen=True)
class Signal:
    severity: float
    """1 at the limit, more beyond; what is to be compared with the same alarm of another iteration."""
    words: str


def kl_budget(history: History, limits: Alarms) -> Signal | None:
    kl, length = history.now("kl/sequence"), history.now("rollout/length")
    if kl is None or length is None:
        return None
    budget = limits.kl_budget or KL_PER_TOKEN * max(length, 1.0)
    return _over(kl, budget, f"KL from the reference is {kl:.3g} nats a reply, the budget is {budget:.3g}")


def entropy_collapse(history: History, limits: Alarms) -> Signal | None:
    return _fell(history, "policy/entropy", limits.entropy_left, "entropy", " nats a token")


def replies_do_not_end(history: History, limits: Alarms) -> Signal | None:
    """Only where the 95% interval of the share, over the replies of the window, is below the limit."""
    ended, count = history.change("rollout/ended"), history.now("rollout/count")
    if ended is None or count is None:
        return None
    replies = round(count * history.window)
    _, high = wilson_interval(ended[1] * replies, replies)
    least = limits.ended_left * ended[0]
    return _under(high, least, f"{ended[1]:.0%} of the replies end by themselves, {ended[0]:.0%} did at the start")


def replies_end_at_once(history: History, limits: Alarms) -> Signal | None:
    return _fell(history, "rollout/length", LENGTH_LEFT, "mean length of a reply", " tokens")


def length_rewarded(history: History, limits: Alarms) -> Signal | None:
    length, correlation = history.change("rollout/length"), history.now("reward/length_correlation")
    if length is None or correlation is None or correlation <= LENGTH_CORRELATION:
        return None
    words = (
        f"replies grew from {length[0]:.3g} to {length[1]:.3g} tokens, and longer ones score higher (correlation of score and "
        f"length {correlation:+.2f})"
    )
    return _over(length[1], limits.length_growth * length[0], words)


def repetition(history: History, limits: Alarms) -> Signal | None:
    change = history.change("rollout/repeated")
    if change is None:
        return None
    words = f"{change[1]:.0%} of the 4-grams of a reply repeat one before, {change[0]:.0%} did at the start"
    return _over(change[1], change[0] + limits.repeated, words)


def alike_replies(history: History, limits: Alarms) -> Signal | None:
    return _fell(history, "rollout/distinct", limits.distinct_left, "share of distinct 2-grams in all replies", "")


def idle_critic(history: History, limits: Alarms) -> Signal | None:
    """The best of the latest, not their median: a critic that was right once is learning."""
    if history.change("value/explained_variance") is None:
        return None
    latest = history.latest["value/explained_variance"]
    words = f"explained variance of the critic was {max(latest):.2f} at best in the last {len(latest)} iterations"
    return Signal(1 - max(latest), words) if max(latest) <= 0 else None


def rising_rate(history: History, limits: Alarms) -> Signal | None:
    now, lowest = history.rate, history.lowest_rate
    if now is None or lowest is None or now <= lowest * (1 + RATE_MOVES):
        return None
    return _over(now, lowest, f"learning rate rose from {lowest:.3g} to {now:.3g} after the warm-up")


def gold_falls(history: History, limits: Alarms) -> Signal | None:
    told = history.evaluations
    gold = [gold for _, gold in told]
    falls = all(later < earlier for earlier, later in pairwise(gold))
    if len(told) <= FALLS_IN_A_ROW or not falls or told[-1][0] <= told[0][0]:
        return None
    words = f"{limits.gold} fell in {FALLS_IN_A_ROW} evaluations in a row, from {gold[0]:.3g} to {gold[-1]:.3g}, "
    return Signal(1.0, words + f"while the score rose from {told[0][0]:.3g} to {told[-1][0]:.3g}")


Rule = Callable[[History, Alarms], Signal | None]

RULES: dict[str, Rule] = {
    "KL budget": kl_budget,
    "entropy collapse": entropy_collapse,
    "replies do not end": replies_do_not_end,
    "replies end at once": replies_end_at_once,
    "length rewarded": length_rewarded,
    "repetition": repetition,
    "alike replies": alike_replies,
    "idle critic": idle_critic,
    "rising learning rate": rising_rate,
    "gold falls": gold_falls,
}
"""By the names that `rlhf explain` knows."""


def signals(history: History, limits: Alarms, rules: Sequence[str] = tuple(RULES)) -> dict[str, Signal]:
    """Of each alarm that there is now."""
    found = {name: RULES[name](history, limits) for name in rules}
    return {name: signal for name, signal in found.items() if signal is not None}


@dataclass
class Bell:
    """Which alarms were said: each once, and again where it is worse or had gone; JSON, as `asdict` has it."""

    window: int
    told: dict[str, float] = field(default_factory=dict)
    """Alarm -> its severity when it was said."""
    quiet: dict[str, int] = field(default_factory=dict)
    """Alarm -> iterations since there was no cause for it."""

    WORSE = 2.0
    """As a factor of severity. About what medians of a few iterations move by themselves at most."""

    def rings(self, found: Mapping[str, Signal], among: Sequence[str]) -> dict[str, Signal]:
        """Those to be said now. An alarm has gone where there was no cause for it in a window."""
        for name in among:
            if name in found:
                self.quiet.pop(name, None)
            elif name in self.told:
                self.quiet[name] = self.quiet.get(name, 0) + 1
                if self.quiet[name] >= self.window:
                    del self.told[name], self.quiet[name]
        new = {name: s for name, s in found.items() if name not in self.told or s.severity > self.WORSE * self.told[name]}
        self.told |= {name: signal.severity for name, signal in new.items()}
        return new


def in_words(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of alarms.jsonl: each alarm once, as it was said last. A line that has no alarm is not of ours."""
    records = [record for record in records if all(isinstance(record.get(name), str) for name in ("alarm", "words", "reply"))]
    last = {record["alarm"]: record for record in records}
    said = {name: sum(record["alarm"] == name for record in records) for name in last}
    return [
        f"Alarm {name} (rlhf explain {name!r}) in step {record['step']}"
        + (f", the last of {said[name]}" if said[name] > 1 else "")
        + f": {record['words']}."
        + (f" A reply: {record['reply']!r}" if record["reply"] else "")
        for name, record in last.items()
    ]


def _over(value: float, limit: float, words: str) -> Signal | None:
    return Signal(value / max(limit, value / LARGEST), words) if value > limit else None


def _under(value: float, limit: float, words: str) -> Signal | None:
    return Signal(limit / max(value, limit / LARGEST), words) if value < limit else None


def _fell(history: History, name: str, left: float, what: str, unit: str) -> Signal | None:
    change = history.change(name)
    if change is None:
        return None
    return _under(change[1], left * change[0], f"{what} fell from {change[0]:.3g} to {change[1]:.3g}{unit}")
