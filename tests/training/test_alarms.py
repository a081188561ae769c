"""What the watch of a run remembers when the run goes on, and what it says when there is no reply to show."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.policies import Alarms
from rlhf.errors import ConfigError
from rlhf.training.alarms import AlarmWatch


class Told:
    """Of a run the parts that a watch speaks to."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.is_main, self.diverted, self.alarms = True, False, self

    def remember(self, **states: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def append_once(self, step: int, record: dict[str, Any]) -> None:
        self.records.append({"step": step, **record})


def watch_of(alarms: Alarms, before: AlarmWatch | None = None) -> AlarmWatch:
    """Goes on where the other one stopped."""
    config = SimpleNamespace(alarms=alarms, kl=SimpleNamespace(controller="fixed"))
    watch = AlarmWatch(Told(), config, None)  # pyright: ignore[reportArgumentType]
    if before is not None:
        watch.load_state_dict(json.loads(json.dumps(before.state_dict())))
    return watch


def told(watch: AlarmWatch) -> Told:
    assert isinstance(watch.train, Told)
    return watch.train


def falling(watch: AlarmWatch, name: str, steps: range) -> list[dict[str, Any]]:
    """The score rises, the metric falls; what was said of it."""
    for step in steps:
        watch.look_at_evaluation(step, {"score": float(step), name: float(-step)})
    return told(watch).records


def test_what_was_evaluated_before_a_run_went_on_counts():
    one = watch_of(Alarms(gold="judge"))
    assert falling(one, "judge", range(3)) == []
    (record,) = falling(watch_of(Alarms(gold="judge"), one), "judge", range(2, 4))  # the second evaluation is made again
    assert (record["step"], record["alarm"]) == (3, "gold falls")


def test_not_where_another_metric_is_gold_now():
    one = watch_of(Alarms(gold="judge"))
    falling(one, "judge", range(3))
    other = watch_of(Alarms(gold="other"), one)
    assert falling(other, "other", range(3, 6)) == []
    assert len(falling(other, "other", range(6, 7))) == 1


def test_when_only_the_last_evaluation_was_left_there_is_no_reply_to_show():
    one = watch_of(Alarms(gold="judge"))
    falling(one, "judge", range(3))
    other = watch_of(Alarms(gold="judge"), one)
    (record,) = falling(other, "judge", range(3, 4))
    assert (record["prompt"], record["reply"]) == ("", "")
    (note,) = told(other).notes
    assert note.startswith("ALARM gold falls in step 3: judge fell in 3 evaluations in a row")


def test_an_evaluation_in_which_no_reply_has_a_score_is_left_out():
    watch = watch_of(Alarms(gold="judge"))
    falling(watch, "judge", range(2))
    watch.look_at_evaluation(2, {"length": 3.0, "judge": -2.0})
    watch.look_at_evaluation(3, {"length": 3.0, "score": 3.0})
    assert falling(watch, "judge", range(4, 5)) == []
    assert len(falling(watch, "judge", range(5, 6))) == 1


def test_a_metric_that_nobody_ever_gave_is_an_error():
    with pytest.raises(ConfigError, match=r"alarms\.gold: no scorer of eval\.scorers gives jugde"):
        watch_of(Alarms(gold="jugde")).look_at_evaluation(0, {"score": 0.0, "judge": 1.0})


def test_a_run_goes_on_with_another_window():
    """Entropy 10 in a hundred iterations: that is the start, also of a longer window."""
    one = watch_of(Alarms())
    for _ in range(100):
        one.history.see({"policy/entropy": 10.0}, warmed_up=True)
    other = watch_of(Alarms(window=10), one)
    assert other.bell.window == 10
    for _ in range(20):
        other.history.see({"policy/entropy": 0.1}, warmed_up=True)
    assert other.history.change("policy/entropy") == (10.0, 0.1)
