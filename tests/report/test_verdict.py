"""What is said of figures whose meaning is known; each with figures of which it must not be said."""

from __future__ import annotations

import pytest

from rlhf.report.html.verdict import Finding, ending, findings, warned, worst

STEADY = {"reward/score_std": 1.0, "rollout/count": 100, "policy/entropy": 1.0, "rollout/ended": 1.0}


def told(stage, result=None, metrics=(), config=None) -> list[tuple[str, str]]:
    return [(found.level, found.text) for found in findings(stage, config or {}, result or {}, list(metrics))]


def of_scores(before, after):
    """Noise of a difference: 2 sqrt(0.1^2 + 0.1^2) = 0.28."""
    records = [{"step": step, "reward/score": 0.0, **STEADY} for step in range(1, 11)]
    result = {name: {"score": score, "score_standard_error": 0.1} for name, score in (("before", before), ("after", after))}
    return told("ppo", result, records)


@pytest.mark.parametrize(
    ("after", "level", "text"), [(1.0, "good", "rose"), (-1.0, "bad", "fell"), (0.2, "warn", "hardly moved")]
)
def test_the_reward(after, level, text):
    ((found, said),) = of_scores(0.0, after)
    assert found == level
    assert text in said


def test_the_reward_without_held_out_prompts():
    rising = [{"step": step, **STEADY, "reward/score": float(step)} for step in range(10)]
    ((level, said),) = told("grpo", {}, rising)
    assert (level, said.split(" on ")[0]) == ("good", "The reward rose from 0.5 to 8.5")


@pytest.mark.parametrize(
    ("kl", "controller", "level"),
    [(7, "adaptive", "good"), (13, "adaptive", "warn"), (13, "fixed", "good"), (60, "fixed", "warn"), (-60, "fixed", "warn")],
)
def test_the_budget_of_kl(kl, controller, level):
    config = {"kl": {"controller": controller, "target": 6.0}}
    assert [found for found, said in told("ppo", {}, [{"step": 1, "kl/sequence": kl}], config)] == [level]


@pytest.mark.parametrize(("kl", "level"), [(4, "good"), (6, "warn")])
def test_the_budget_of_kl_is_that_of_the_alarms(kl, level):
    config = {"kl": {"controller": "fixed"}, "alarms": {"kl_budget": 5.0}}
    ((found, said),) = told("ppo", {}, [{"step": 1, "kl/sequence": kl}], config)
    assert (found, "budget of 5" in said) == (level, True)


@pytest.mark.parametrize(
    ("name", "values", "bad"),
    [
        ("policy/clip_fraction", [0.5] * 5, True),
        ("policy/clip_fraction", [0.1] * 5, False),
        ("rollout/ended", [0.2] * 5, True),
        ("rollout/ended", [0.9] * 5, False),
        ("policy/entropy", [1, 1, 1, 1, 0.05], True),
        ("policy/entropy", [1, 1, 1, 1, 0.5], False),
        ("value/explained_variance", [0, 0, 0, 0, -1], True),
        ("value/explained_variance", [-4, 0, 0, 0, 0.8], False),
    ],
)
def test_warnings_of_the_update(name, values, bad):
    found = told("ppo", {}, [{"step": step, name: value} for step, value in enumerate(values)])
    assert [level for level, _ in found] == (["warn"] if bad else [])


@pytest.mark.parametrize(
    ("low", "high", "level", "text"),
    [(0.45, 0.7, "bad", "No better than a coin"), (0.55, 0.7, "good", "right on"), (0.05, 0.2, "bad", "exchanged")],
)
def test_a_reward_model_against_a_coin(low, high, level, text):
    result = {"eval/accuracy": (low + high) / 2, "eval/accuracy_low": low, "eval/accuracy_high": high}
    ((found, said),) = told("rm", result)
    assert found == level
    assert text in said


def test_length_bias_and_calibration():
    result = {"eval/accuracy": 0.9, "eval/accuracy_low": 0.8, "eval/accuracy_high": 0.95}
    biased = {"eval/length_correlation": 0.7, "eval/calibration_error": 0.2, "eval/longer_wins": 0.85}
    assert [level for level, _ in told("rm", result | biased)] == ["good", "warn", "warn", "warn"]
    fair = {"eval/length_correlation": 0.1, "eval/calibration_error": 0.02, "eval/longer_wins": 0.5}
    assert [level for level, _ in told("rm", result | fair)] == ["good", "good", "good"]
    by_length = {"eval/pairs": 40, "eval/accuracy_of_shorter": 0.25, "eval/accuracy_of_longer": 0.75}
    (_, accuracy), (_, length), (_, calibration) = told("rm", result | fair | by_length)
    assert accuracy == "It is right on 90.0% of 40 held-out pairs (95%: 80.0% to 95.0%)."
    assert "(correlation +0.10); right on 25.0% where the shorter reply is the better one, on 75.0%" in length
    assert "2.0% off" in calibration


@pytest.mark.parametrize("stage", ["rm", "dpo", "kto"])
@pytest.mark.parametrize(("losses", "level"), [((0.7, 0.4), "good"), ((0.4, 0.7), "bad")])
def test_the_loss_of_preferences(stage, losses, level):
    """From one level to the other in ten equal steps of 0.03: by chance alone it would move by 2 * 0.03 / sqrt(2)."""
    first, last = losses
    line = [first + (last - first) * part / 10 for part in range(11)]
    ((found, said),) = told(stage, {}, [{"step": step, "loss": loss} for step, loss in enumerate(line)])
    change = (last - first) / 20  # the means of two steps at each end
    assert (found, said) == (level, f"The training loss went from {first + change:.4g} to {last - change:.4g}.")


def test_a_change_within_the_noise_is_no_verdict():
    """The means of one step at each end, 2.2 and 2.5; the neighbours differ by 0.3 in the mean square."""
    ((level, said),) = told("sft", {}, [{"step": step, "loss": loss} for step, loss in enumerate((2.2, 2.5, 2.2, 2.5))])
    assert level == "warn"
    assert "from 2.2 to 2.5; chance alone moves it by 0.6" in said


@pytest.mark.parametrize(
    ("losses", "levels"), [((3, 2), ["good"]), ((2, 3), ["bad", "warn"]), ((3, 1, 2), ["good", "warn"]), ((2, 2), ["warn"])]
)
def test_held_out_loss(losses, levels):
    assert [level for level, _ in told("sft", {}, [{"step": n, "eval/loss": loss} for n, loss in enumerate(losses)])] == levels


def test_who_has_held_out_rows_is_not_asked_for_them():
    records = [{"step": step, "loss": 2.0 + step % 2} for step in range(4)]
    assert "Give data.eval" in told("sft", {}, records)[0][1]
    assert "Give data.eval" not in told("sft", {}, [*records, {"step": 4, "eval/loss": 2.0}])[0][1]


def test_the_worst_of_them():
    assert worst([]) == "good"
    assert worst([Finding("warn", ""), Finding("bad", ""), Finding("good", "")]) == "bad"
    assert ending("failed", "disk full") == Finding("bad", "The run failed: disk full")


def test_one_hard_batch_at_the_end_is_no_failure():
    """Means of the first and the last fifth: 2.0, and (0.1 + 1.1) / 2."""
    losses = [2.0, 2.0, *[0.5] * 6, 0.1, 1.1]
    assert told("sft", {}, [{"step": step, "loss": loss} for step, loss in enumerate(losses)]) == [
        ("good", "The training loss went from 2 to 0.6.")
    ]


def test_a_warning_says_when_it_came_unless_that_was_at_the_start():
    notes = [(0, "warning: few rows"), (3, "warning: no score"), (4, "warning: no score"), (5, "a note")]
    assert [found.text for found in warned(notes)] == ["Few rows", "No score (after step 3)"]
