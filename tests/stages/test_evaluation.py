"""`rlhf eval` beyond one number: slices, implicit rewards and the base, against transformers' forward and counts by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from binomial import binomial_quantile
from harness import flags, run
from test_generate_eval import END, evaluated, own_loss, own_scores, rows_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.data.examples import RankedExample
from rlhf.errors import CheckFailed
from rlhf.training.evaluation.forgetting import judged
from rlhf.training.evaluation.slices import slices


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """The rates p with |successes / trials - p| = 1.959964 sqrt(p (1 - p) / trials), by the quadratic formula."""
    z, rate = 1.959964**2 / trials, successes / trials
    half = math.sqrt((2 * rate + z) ** 2 - 4 * (1 + z) * rate**2)
    return (2 * rate + z - half) / (2 * (1 + z)), (2 * rate + z + half) / (2 * (1 + z))


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_accuracy_by_source(models, capsys):
    found = evaluated(capsys, models / "critic", "--data", models / "labelled.jsonl", "--slice", "source", "--batch-size", 5)
    rows = rows_of(models / "labelled.jsonl")
    right = [
        a > b for a, b in zip(*(own_scores(models / "critic", rows, side) for side in ("chosen", "rejected")), strict=True)
    ]
    longer = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    expected = {
        "better reply is longer": [ok for ok, by in zip(right, longer, strict=True) if by > 0],
        "better reply is shorter": [ok for ok, by in zip(right, longer, strict=True) if by < 0],
        "better reply is as long": [ok for ok, by in zip(right, longer, strict=True) if by == 0],
        "source: web": [ok for ok, row in zip(right, rows, strict=True) if row["source"] == "web"],
        "source: book": [ok for ok, row in zip(right, rows, strict=True) if row["source"] == "book"],
    }
    assert list(found["slices"]["fp32"]) == [name for name, part in expected.items() if part]
    for name, part in expected.items():
        if part:
            low, high = wilson(sum(part), len(part))
            row = {"prompts": len(part), "accuracy": sum(part) / len(part), "accuracy_low": low, "accuracy_high": high}
            assert found["slices"]["fp32"][name] == pytest.approx(row, rel=1e-5), name
    assert found["slices"]["fp32"]["source: web"]["accuracy"] != found["slices"]["fp32"]["source: book"]["accuracy"]


def test_slices_by_hand():
    """Three prompts: a pair that is right, one that is wrong, and three ranked replies, two of whose pairs are right."""
    pair = RankedExample([1], [[2, 2], [3]], [0.0, 1.0], others={"level": 3, "hard": True})
    wrong = RankedExample([1], [[2], [3]], [0.0, 1.0], others={"level": 2.5, "hard": False})
    three = RankedExample([1], [[2], [3], [4, 4]], [0.0, 1.0, 2.0], others={"level": 3, "hard": False})
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 1.0, 0.0])
    found = slices([pair, wrong, three], scores, ["level", "hard"])
    counted = {name: (row["prompts"], row["accuracy"]) for name, row in found.items()}
    assert counted == {
        "better reply is longer": (1.0, 1.0),
        "better reply is shorter": (pytest.approx(2 / 3), 1.0),  # two of the three pairs of one prompt
        "better reply is as long": (pytest.approx(4 / 3), 0.0),
        "level: 3": (pytest.approx(2), pytest.approx((1 + 2 / 3) / 2)),
        "level: 2.5": (1.0, 0.0),
        "hard: false": (pytest.approx(2), pytest.approx(1 / 3)),
        "hard: true": (1.0, 1.0),
    }


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_slices_take_one_pass_however_many_there_are():
    """A pass of its own for each value is quadratic where each row has its own."""
    counts = []
    for values in (2, 200):
        examples = [RankedExample([1], [[2, 2], [3]], [0.0, 1.0], others={"id": at % values}) for at in range(200)]
        with Operations() as operations:
            found = slices(examples, torch.tensor([1.0, 0.0] * 200), ["id"])
        assert (len(found), found["id: 1"]["prompts"]) == (1 + values, 200 / values)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_few_are_said_to_be_few(models, capsys):
    assert main(["eval", str(models / "critic"), "--data", str(models / "labelled.jsonl"), "--slice", "source"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  source: ")]
    assert [line.split()[1] for line in lines] == ["web", "book"]
    assert all(line.endswith("few: says little") for line in lines)  # 24 and 13 of them


# ---- implicit rewards ------------------------------------------------------------------------------------------------


def reply_logprob(directory: Path, row: dict, side: str) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    prompt, reply = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row[side])["input_ids"], END]
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(reply))


def test_implicit_rewards_are_log_ratios(models, tmp_path, capsys):
    rows = rows_of(models / "labelled.jsonl")[:11]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--data", tmp_path / "few.jsonl", "--slice", "source", "--batch-size", 3)
    found = evaluated(capsys, models / "worse", *words, "--reference", models / "model", "--beta", 0.5)
    own = {
        (at, side): 0.5 * (reply_logprob(models / "worse", row, side) - reply_logprob(models / "model", row, side))
        for at, row in enumerate(rows)
        for side in ("chosen", "rejected")
    }
    margins = [own[at, "chosen"] - own[at, "rejected"] for at in range(11)]
    figures = found["figures"]["fp32"]
    assert 0 < sum(margin > 0 for margin in margins) < 11
    assert figures["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 11)
    assert figures["margin"] == pytest.approx(sum(margins) / 11, rel=1e-4)
    assert figures["loss"] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 11, rel=1e-4)  # DPO's
    assert figures["moved_alone"] < 1e-4
    assert found["slices"]["fp32"]["source: book"]["prompts"] == 4
    itself = evaluated(capsys, models / "model", *words, "--reference", models / "model")
    assert itself["figures"]["fp32"]["margin"] == 0  # and every pair a coin
    assert itself["figures"]["fp32"]["accuracy"] == 0.5


def test_a_run_of_dpo_said_the_same(models, tmp_path, capsys):
    """Of its held-out pairs, at its end: eval/accuracy, eval/loss and eval/margin of run.json."""
    arguments = flags("dpo", models, tmp_path / "dpo", optimizer__lr=1e-2, loss__beta=0.3, checkpoint__every=0)
    assert run("dpo", arguments, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    said = json.loads((tmp_path / "dpo" / "run.json").read_text())["result"]
    words = ("--data", models / "pairs.jsonl", "--reference", models / "model")
    found = evaluated(capsys, tmp_path / "dpo", *words, "--beta", 0.3)["figures"]["fp32"]
    assert said["eval/accuracy"] > 0.5
    for name in ("accuracy", "accuracy_low", "accuracy_high", "loss", "margin"):
        assert found[name] == pytest.approx(said[f"eval/{name}"], rel=1e-4), name
    other = evaluated(capsys, tmp_path / "dpo", *words, "--beta", 3)["figures"]["fp32"]
    assert (other["accuracy"], other["margin"]) == pytest.approx((found["accuracy"], 10 * found["margin"]))


# ---- the base --------------------------------------------------------------------------------------------------------


def test_what_was_lost_by_hand():
    """Ten rows of two tokens; four of them cost 2 nats more than before. Resampled, so many are binomial."""
    before = {f"rows.jsonl:{row}": (3.0 + row, 2.0) for row in range(10)}
    after = {where: (total + (2.0 if row < 4 else 0.0), 2.0) for row, (where, (total, _)) in enumerate(before.items())}
    found = judged(before, after, True, "base", None)
    low, high = (binomial_quantile(10, 0.4, tail) / 10 for tail in (0.025, 0.975))
    assert (found["before"], found["after"], found["lost"]) == pytest.approx((7.5 / 2, 8.3 / 2, 0.4))
    assert (found["lost_low"], found["lost_high"]) == pytest.approx((low, high))
    assert (found["perplexity_ratio"], found["perplexity_ratio_low"]) == pytest.approx((math.exp(0.4), math.exp(low)))
    assert found["verdict"] == "worse than its base"
    assert judged(after, before, True, "base", None)["verdict"] == "better than its base"
    assert judged(before, before, True, "base", None)["verdict"] == "no difference that these rows show"


@pytest.mark.parametrize(("limit", "failed"), [(0.0, True), (0.05, True), (0.1, False), (0.5, False), (0.9, False)])
def test_the_gate_goes_by_the_interval(limit, failed):
    """The interval is 0.1 to 0.7; a loss of accuracy is told with the sign turned."""
    before = {f"rows.jsonl:{row}": (1.0, 1.0) for row in range(10)}
    after = {where: (0.0 if row < 4 else 1.0, 1.0) for row, where in enumerate(before)}
    found = judged(before, after, False, "base", limit)
    assert (found["of"], found["lost_low"], found["lost_high"]) == ("accuracy", pytest.approx(0.1), pytest.approx(0.7))
    assert ("failed" in found) == failed
    if not failed:
        assert ("more rows would tell" in found["verdict"]) == (limit < 0.7)


def test_rows_are_compared_with_themselves():
    """Rows that one of the two did not have are left out; what is hard for both is no noise."""
    before = {"a:1": (100.0, 10.0), "a:2": (1.0, 10.0), "a:3": (5.0, 10.0)}
    after = {"a:1": (110.0, 10.0), "a:2": (11.0, 10.0), "a:4": (999.0, 10.0)}
    found = judged(before, after, True, "base", 0.5)
    assert found["rows"] == 2
    assert (found["lost_low"], found["lost"], found["lost_high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert "failed" in found


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["before", "after"])
def test_the_gate_does_not_pass_what_is_no_number(number, side):
    sums = {"before": {"a:1": (1.0, 2.0), "a:2": (3.0, 2.0)}, "after": {"a:1": (1.0, 2.0), "a:2": (3.0, 2.0)}}
    assert "failed" not in judged(sums["before"], sums["after"], True, "base", 0.5)
    sums[side]["a:2"] = (number, 2.0)
    with pytest.raises(CheckFailed, match=r"a:2: what is compared with the base base is not finite: "):
        judged(sums["before"], sums["after"], True, "base", 0.5)


def test_a_policy_beside_its_base(models, capsys):
    words = ("--data", models / "sft.jsonl", "--base")
    lost = evaluated(capsys, models / "worse", *words, models / "uniform", "--batch-size", 5)["forgetting"]
    loss, _ = own_loss(models / "worse", rows_of(models / "sft.jsonl"), on_prompt=False)
    assert lost["before"] == pytest.approx(math.log(10), rel=1e-5)
    assert (lost["after"], lost["lost"]) == pytest.approx((loss, loss - math.log(10)), rel=1e-5)
    assert lost["lost_low"] < lost["lost"] < lost["lost_high"]
    assert lost["perplexity_before"] == pytest.approx(10, rel=1e-5)
    assert lost["rows"] == 37
    same = evaluated(capsys, models / "worse", *words, models / "worse", "--max-forgetting", 0)["forgetting"]
    assert (same["lost_low"], same["lost"], same["lost_high"]) == (0, 0, 0)
    gained = evaluated(capsys, models / "uniform", *words, models / "worse", "--max-forgetting", 0)["forgetting"]
    assert gained["lost"] == pytest.approx(-lost["lost"])


def test_more_lost_than_may_be_ends_with_1(models, tmp_path, capsys):
    words = [str(models / "worse"), "--data", str(models / "sft.jsonl"), "--base", str(models / "uniform")]
    assert main(["eval", *words, "--max-forgetting", "0.01", "--output", str(tmp_path / "result.json")]) == 1
    printed = capsys.readouterr()
    assert "worse is" not in printed.err
    assert "the model is worse than its base" in printed.err
    assert f"beside its base {models / 'uniform'}, on the same 37 rows" in printed.out  # the result is told all the same
    assert json.loads((tmp_path / "result.json").read_text())["forgetting"]["verdict"] == "refused"
    assert main(["eval", *words, "--max-forgetting", "100"]) == 0


def test_a_reward_model_beside_its_base(models, llamas, capsys, reward):
    words = ("--data", llamas / "pairs.jsonl")
    lost = evaluated(capsys, reward, *words, "--base", models / "critic")["forgetting"]
    before, after = (evaluated(capsys, one, *words)["figures"]["fp32"]["accuracy"] for one in (models / "critic", reward))
    assert (lost["of"], lost["before"], lost["after"], lost["lost"]) == pytest.approx(
        ("accuracy", before, after, before - after)
    )
    assert before != after


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("critic --data pairs.jsonl --slice source", 65, "pairs.jsonl:1: source is missing, which --slice asks for"),
        ("critic --data labelled.jsonl --slice prompt,nothing", 65, "nothing is missing, which --slice asks for"),
        ("critic --data labelled.jsonl", 65, "unknown column 'source'"),
        ("model --data sft.jsonl --slice source", 78, "slice: is of pairs; model is a policy"),
        ("model --prompts prompts.jsonl --slice source", 78, "slice is of held-out pairs: give data, or leave it out"),
        ("model --prompts prompts.jsonl --data sft.jsonl", 78, "both are given: give --data or --prompts"),
        ("critic --data pairs.jsonl --reference model", 78, "reference: is of a policy's implicit rewards"),
        ("model --prompts prompts.jsonl --reference model --beta 1", 78, "beta is a factor of implicit rewards, which are of"),
        ("model --data pairs.jsonl --beta 1", 78, "beta is a factor of implicit rewards: give reference"),
        (
            "model --data pairs.jsonl --reference other",
            65,
            "the tokenizer of the reference other is not that of",
        ),
        ("model --data sft.jsonl --base other", 65, "base other: its tokenizer is not that of model"),
        ("model --data sft.jsonl --base critic", 65, "base critic: model is a policy, this is not"),
        ("critic --data pairs.jsonl --base model", 65, "base model: critic is a reward model, this is not"),
        ("model --data sft.jsonl --max-forgetting 1", 78, "max_forgetting limits what was lost from a base: give base"),
        ("model --data sft.jsonl --max-forgetting -1 --base model", 78, "expected a number, at least 0"),
        ("model --data pairs.jsonl --reference model --base model", 78, "base and reference are both given"),
        ("model --data sft.jsonl --base model --precision both", 78, "precision `both` is for one model on held-out rows"),
        ("model --data sft.jsonl --base short", 65, "positions, the base short has 8: lower data.max_length"),
        ("model --data pairs.jsonl --reference short", 65, "positions, the reference short has 8: lower data.max_length"),
        ("nan --data sft.jsonl --base model --max-forgetting 0.05", 1, "nan in fp32: 141 of the 141 numbers"),
        ("model --data sft.jsonl --base nan --max-forgetting 0.05", 1, "nan: 141 of the 141 numbers that it gives these rows"),
        ("model --data pairs.jsonl --reference nan", 1, "nan: 74 of the 74 numbers that it gives these rows are NaN"),
        ("model --data one.jsonl --base model", 65, "base model: 1 of the rows can be compared, expected two at least"),
        ("model --data sft.jsonl --temperature 0.5", 78, "temperature is of replies to prompts: give prompts"),
        ("model --data sft.jsonl --output sft.jsonl", 73, "sft.jsonl: is there already"),
    ],
)
def test_a_mistake_is_one_message(models, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(models)
    (models / "one.jsonl").write_text('{"prompt": "a b", "completion": " c"}\n')
    assert main(["eval", *words.split()]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("rlhf: error: ") == 1
    assert message in printed.err
