"""Alarms by figures worked out by hand, each beside figures of which it must be silent; and when one is said again."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from rlhf.config.policies import Alarms
from rlhf.functional.preference import wilson_interval
from rlhf.report.alarms import RULES, Bell, History, Signal, in_words, signals
from rlhf.rollout.ngrams import distinct, repeated
from rlhf.runs.explain import ENTRIES

LIMITS = Alarms(window=3)


def seen(limits: Alarms = LIMITS, **figures: list[float]) -> History:
    """By `kl__sequence` for kl/sequence; a figure of one value is constant."""
    history, count = History(limits.window), max(map(len, figures.values()))
    for step in range(count):
        values = {name.replace("__", "/"): series[step if len(series) > 1 else 0] for name, series in figures.items()}
        history.see(values, warmed_up=True)
    return history


def raised(limits: Alarms = LIMITS, **figures: list[float]) -> list[str]:
    return list(signals(seen(limits, **figures), limits))


ONE_ODD = [1, 1, 1, 1, 9, 1]
"""A median of three does not see it."""


@pytest.mark.parametrize(
    ("kl", "limits", "alarm"),
    [
        ([5.1] * 3, LIMITS, True),  # half a nat for each of 10 tokens
        ([4.9] * 3, LIMITS, False),
        ([5.1] * 2, LIMITS, False),  # no window yet
        ([0, 0, 0, 0, 50, 0], LIMITS, False),
        ([2.1] * 3, LIMITS.model_copy(update={"kl_budget": 2.0}), True),
        ([5.1] * 3, LIMITS.model_copy(update={"kl_budget": 6.0}), False),
    ],
)
def test_the_budget_of_kl(kl, limits, alarm):
    assert raised(limits, kl__sequence=kl, rollout__length=[10]) == (["KL budget"] if alarm else [])


def test_a_severity_is_how_far_a_limit_is_passed():
    """Medians 2 and 0.1: limit 0.2, passed by half. KL 15 of 5."""
    found = signals(seen(policy__entropy=[1, 2, 3, 0.3, 0.1, 0.1], kl__sequence=[15], rollout__length=[10]), LIMITS)
    assert {name: signal.severity for name, signal in found.items()} == pytest.approx(
        {"KL budget": 3.0, "entropy collapse": 2.0}
    )
    assert found["entropy collapse"].words == "entropy fell from 2 to 0.1 nats a token"


@pytest.mark.parametrize(
    ("figures", "alarm"),
    [
        ({"policy__entropy": [1, 1, 1, 0.09, 0.09, 0.09]}, "entropy collapse"),
        ({"policy__entropy": [1, 1, 1, 0.11, 0.11, 0.11]}, None),
        ({"policy__entropy": [1, 1, 1, 0.09, 0.09]}, None),  # two of three are of the first window
        ({"policy__entropy": [1, 1, 1, 1, 0.01, 1]}, None),
        ({"rollout__length": [20, 20, 20, 3.9, 3.9, 3.9]}, "replies end at once"),
        ({"rollout__length": [20, 20, 20, 4.1, 4.1, 4.1]}, None),
        ({"rollout__length": [10, 10, 10, 16, 16, 16], "reward__length_correlation": [0.6]}, "length rewarded"),
        ({"rollout__length": [10, 10, 10, 16, 16, 16], "reward__length_correlation": [0.4]}, None),
        ({"rollout__length": [10, 10, 10, 14, 14, 14], "reward__length_correlation": [0.6]}, None),
        ({"rollout__length": [10, 10, 10, 16, 16, 16], "reward__length_correlation": [-0.9]}, None),
        ({"rollout__repeated": [0.1, 0.1, 0.1, 0.31, 0.31, 0.31]}, "repetition"),
        ({"rollout__repeated": [0.1, 0.1, 0.1, 0.29, 0.29, 0.29]}, None),
        ({"rollout__repeated": [0.5]*6}, None),  # as at the start
        ({"rollout__distinct": [0.4, 0.4, 0.4, 0.09, 0.09, 0.09]}, "alike replies"),
        ({"rollout__distinct": [0.4, 0.4, 0.4, 0.11, 0.11, 0.11]}, None),
        ({"value__explained_variance": [-1, -2, -1, -3, -0.1, 0]}, "idle critic"),
        ({"value__explained_variance": [-1, -2, -1, -3, -0.1, 0.01]}, None),
        ({"value__explained_variance": [-1] * 5}, None),
        ({"optimizer__lr": [1e-5, 0.9e-5, 0.8e-5, 0.81e-5]}, "rising learning rate"),
        ({"optimizer__lr": [1e-5, 0.9e-5, 0.8e-5, 0.8e-5 * (1 + 1e-9)]}, None),
        ({"optimizer__lr": [1e-5, 0.5e-5, 0.0]}, None),
        ({"rollout__length": ONE_ODD, "reward__length_correlation": ONE_ODD, "rollout__repeated": ONE_ODD,
          "value__explained_variance": ONE_ODD, "policy__entropy": ONE_ODD, "rollout__distinct": ONE_ODD}, None),
    ],
)  # fmt: skip
def test_what_is_compared_with_the_start(figures, alarm):
    assert raised(**figures) == ([] if alarm is None else [alarm])


@pytest.mark.parametrize(("count", "alarm"), [(100, True), (4, False)])
def test_few_replies_say_little_about_how_many_end(count, alarm):
    """A third after 90%, so the limit is 45%: of 300 replies the interval ends at 39%, of 12 at 61%."""
    assert wilson_interval(100.0, 300)[1] == pytest.approx(0.388, abs=1e-3)
    assert wilson_interval(4.0, 12)[1] == pytest.approx(0.609, abs=1e-3)
    shares = [0.9, 0.9, 0.9, 1 / 3, 1 / 3, 1 / 3]
    assert raised(rollout__ended=shares, rollout__count=[count]) == (["replies do not end"] if alarm else [])
    assert raised(rollout__ended=[0.1] * 6, rollout__count=[count]) == []  # they never did


def test_a_rate_may_rise_in_the_warm_up():
    history = History(3)
    for rate, warmed_up in ((1e-6, False), (2e-6, False), (3e-6, True), (2e-6, True)):
        history.see({"optimizer/lr": rate}, warmed_up)
        assert signals(history, LIMITS) == {}
    history.see({}, True)  # an iteration without a step has none
    history.see({"optimizer/lr": 2.5e-6}, False)  # longer than it was, the run is in its warm-up again
    (signal,) = signals(history, LIMITS).values()
    assert signal == Signal(pytest.approx(1.25), "learning rate rose from 2e-06 to 2.5e-06 after the warm-up")


@pytest.mark.parametrize(
    ("evaluations", "alarm"),
    [
        ([(1, 4), (2, 3), (3, 2), (4, 1)], True),
        ([(1, 4), (2, 3), (3, 2)], False),  # two falls
        ([(1, 4), (2, 3), (3, 3), (4, 1)], False),
        ([(1, 4), (0.5, 3), (0.7, 2), (0.9, 1)], False),  # the score fell as well
        ([(1, 1), (1, 4), (2, 3), (3, 2), (4, 1)], True),
    ],
)
def test_gold(evaluations, alarm):
    history = History(3)
    for step, (score, gold) in enumerate(evaluations):
        assert history.see_evaluation(step, score, "judge", gold)
        assert not history.see_evaluation(step, score, "judge", gold)  # a run that is over evaluates once more
    assert list(signals(history, Alarms(gold="judge"))) == (["gold falls"] if alarm else [])


def goes_on(history: History, window: int) -> History:
    return History(**json.loads(json.dumps(asdict(history))) | {"window": window})


def given(history: History, name: str, *series: tuple[float, int]) -> History:
    """Each value so many times."""
    for value, times in series:
        for _ in range(times):
            history.see({name: value}, True)
    return history


@pytest.mark.parametrize("window", [3, 5, 10])
def test_the_start_stays_the_start_when_a_run_goes_on_with_another_window(window):
    """Entropy 10, then a hundredth of it; at 2, a fifth of it, nothing is to be said."""
    history = goes_on(given(History(5), "policy/entropy", (10.0, 100)), window)
    assert signals(given(history, "policy/entropy", (2.0, 2 * window)), Alarms(window=window)) == {}
    assert set(signals(given(history, "policy/entropy", (0.1, window)), Alarms(window=window))) == {"entropy collapse"}
    assert history.change("policy/entropy") == (10.0, 0.1)


@pytest.mark.parametrize("at", [2, 4, 6])
def test_while_all_is_remembered_another_window_is_as_if_it_had_been_so_from_the_start(at):
    values = [float(value) for value in range(24)]
    history = History(3)
    for number, value in enumerate(values):
        history = goes_on(history, 6) if number == at else history
        history.see({"policy/entropy": value}, True)
    assert history.change("policy/entropy") == (2.5, 20.5)  # medians of 0 to 5 and of 18 to 23


def test_what_was_saved_before_values_were_counted_goes_on():
    saved = asdict(given(History(3), "policy/entropy", (10.0, 20)))
    del saved["count"], saved["missing"]
    assert given(History(**saved), "policy/entropy", (0.5, 6)).change("policy/entropy") == (10.0, 0.5)


def test_two_gold_metrics_are_no_series():
    """The one is a share and falls once; the other is of a hundred, and falls once."""
    history = History(3)
    for step, (name, gold) in enumerate((("a", 99.0), ("a", 98.0), ("b", 0.9), ("b", 0.8))):
        history = goes_on(history, 3)
        history.see_evaluation(step, float(step), name, gold)
        assert signals(history, Alarms(gold=name)) == {}
    for step, gold in ((4, 0.7), (5, 0.6)):
        history.see_evaluation(step, float(step), "b", gold)
    assert set(signals(history, Alarms(gold="b"))) == {"gold falls"}


def test_a_figure_that_no_longer_comes_says_nothing():
    """Replies that nobody scores have no correlation; after so many iterations what it was is no news."""
    history, longer = History(3), {"rollout/length": 20.0}
    for _ in range(6):
        history.see({"rollout/length": 10.0, "reward/length_correlation": 0.9}, True)
    for _ in range(2):
        history.see(longer, True)
    assert set(signals(history, LIMITS)) == {"length rewarded"}
    history.see(longer, True)
    assert signals(history, LIMITS) == {}
    history.see(longer | {"reward/length_correlation": 0.9}, True)
    assert set(signals(history, LIMITS)) == {"length rewarded"}


def test_once_and_again_where_it_is_worse_or_had_gone():
    bell, said = Bell(window=2), []
    severities = [1.0, 1.5, 1.9, 2.1, 2.1, None, 2.0, None, None, 1.0]
    for step, severity in enumerate(severities):
        found = {} if severity is None else {"KL budget": Signal(severity, "")}
        if bell.rings(found, ["KL budget"]):
            said.append(step)
    # 2.1 is more than twice 1.0; one quiet iteration is no end of it, two are
    assert said == [0, 3, 9]


def test_evaluations_do_not_make_an_alarm_of_iterations_go():
    bell = Bell(window=1)
    assert bell.rings({"KL budget": Signal(1.0, "")}, ["KL budget"])
    assert not bell.rings({}, ["gold falls"])
    assert not bell.rings({"KL budget": Signal(1.0, "")}, ["KL budget"])


def test_state_is_json_and_goes_on():
    series = {"policy__entropy": [3, 2, 1, 1 / 3, 0.1, 1e-9], "optimizer__lr": [1e-5, 1e-6]}
    whole = seen(policy__entropy=series["policy__entropy"])
    half = seen(policy__entropy=series["policy__entropy"][:4])
    half = History(**json.loads(json.dumps(asdict(half))))
    for value in series["policy__entropy"][4:]:
        half.see({"policy/entropy": value}, True)
    assert half == whole
    bell = Bell(2, {"repetition": 1.1}, {"repetition": 1})
    assert Bell(**json.loads(json.dumps(asdict(bell)))) == bell


def test_every_alarm_is_explained():
    assert {entry.name for entry in ENTRIES if entry.kind == "alarm"} == set(RULES)


def test_n_grams_by_hand():
    """a b a b a b: ab ba ab ba ab; of its three 4-grams abab, baba, abab one is a repetition."""
    assert repeated([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert repeated([1] * 13) == pytest.approx(0.9)  # ten of one kind
    assert repeated([1, 2, 3]) == 0.0
    assert repeated(list(range(50))) == 0.0
    assert distinct([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)  # 12 23, 12 24
    assert distinct([[1, 2, 1, 2, 1, 2]]) == pytest.approx(2 / 5)
    assert distinct([[1], []]) == 0.0


def test_what_the_report_says():
    of = {"prompt": "a", "reply": "b b"}
    records = [
        {"step": 3, "alarm": "repetition", "words": "30% of", **of},
        {"step": 4, "alarm": "KL budget", "words": "KL is 9", **of},
        {"step": 8, "alarm": "repetition", "words": "60% of", **of},
    ]
    odd = [
        {"step": 9},
        {"step": 9, "alarm": None, "words": "", "reply": ""},
        {"step": 9, "alarm": "x", "words": 1, "reply": ""},
    ]
    assert in_words(odd) == []  # of whoever wrote them
    late = {"step": 9, "alarm": "gold falls", "words": "it fell", "prompt": "", "reply": ""}
    assert in_words([late]) == ["Alarm gold falls (rlhf explain 'gold falls') in step 9: it fell."]
    assert in_words([*odd, *records]) == [
        "Alarm repetition (rlhf explain 'repetition') in step 8, the last of 2: 60% of. A reply: 'b b'",
        "Alarm KL budget (rlhf explain 'KL budget') in step 4: KL is 9. A reply: 'b b'",
    ]
