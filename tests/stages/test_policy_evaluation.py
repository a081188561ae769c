"""`rlhf eval --prompts`: figures of replies, counted by hand from the replies themselves and from transformers' forward."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_evaluation import wilson
from test_generate_eval import END, generated, own_scores
from test_judge import LONGER, judge
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.cli import main
from rlhf.data.examples import PromptExample
from rlhf.data.rows import Row
from rlhf.rollout.engines import Samples
from rlhf.rollout.rewards import Scores
from rlhf.training.evaluation.prompts import wins
from rlhf.training.evaluation.replies import Answered

LENGTH = ("--max-new-tokens", 5)


def evaluated(capsys, output: Path, *words: object) -> tuple[dict, list[dict]]:
    """(what is printed, the replies that are written beside it)."""
    output.unlink(missing_ok=True)
    assert main(["eval", *map(str, words), "--output", str(output), "--json"]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(output.read_text())
    replies = written.pop("replies")
    assert written == printed
    return printed, replies


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def spelt(answer: dict) -> bool:
    """Whether the reply's text is all of it: a pad that was drawn is in no text."""
    return answer["tokens"] == len(answer["response"].split()) + answer["finished"]


def words_of(row: dict) -> list[str]:
    return row["model"]["response"].split()


def test_replies_are_counted(models, tmp_path, capsys):
    data = (models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--seed", 3)
    found, replies = evaluated(capsys, tmp_path / "a.json", *data, "--reward", "count:a", "--batch-size", 4)
    same = generated(tmp_path / "replies.jsonl", models / "model", "--data", models / "prompts.jsonl", *LENGTH, "--seed", 3)
    capsys.readouterr()
    assert [row["model"]["response"] for row in replies] == [row["response"] for row in same]
    figures, ended = found["figures"]["model"], [row["model"]["finished"] for row in replies]
    assert figures["reward"]["mean"] == pytest.approx(mean(words_of(row).count("a") for row in replies))
    assert figures["reward"]["low"] < figures["reward"]["mean"] < figures["reward"]["high"]
    assert figures["ended"]["mean"] == mean(ended)
    assert (figures["ended"]["low"], figures["ended"]["high"]) == pytest.approx(wilson(sum(ended), 29), rel=1e-5)
    assert figures["length"]["mean"] == pytest.approx(mean(row["model"]["tokens"] for row in replies))
    # a pad may be drawn in the middle, too; it is no word
    assert all(row["model"]["tokens"] >= len(words_of(row)) + row["model"]["finished"] for row in replies)
    assert any(spelt(row["model"]) for row in replies)
    assert 0 < sum(ended) < 29
    assert "kl" not in figures
    assert found["wins"] == {}
    _, others = evaluated(capsys, tmp_path / "b.json", *data[:-1], 4)
    assert [row["model"]["response"] for row in others] != [row["model"]["response"] for row in replies]


def test_a_reward_model_reads_them_as_they_ended(models, tmp_path, capsys):
    data = (models / "model", "--prompts", models / "prompts.jsonl", *LENGTH)
    found, replies = evaluated(capsys, tmp_path / "a.json", *data, "--reward", models / "critic", "--reward.weight", -2)
    ended = [row for row in replies if row["model"]["finished"] and spelt(row["model"])]
    rows = [{"prompt": row["prompt"], "response": f" {row['model']['response']}"} for row in ended]
    expected = own_scores(models / "critic", rows, "response")
    assert len(expected) > 5
    assert [row["model"]["score"] for row in ended] == pytest.approx([-2 * score for score in expected], abs=1e-4)
    assert found["figures"]["model"]["reward"]["mean"] == pytest.approx(mean(row["model"]["score"] for row in replies))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_kl_is_the_mean_log_ratio_of_replies(models, tmp_path, capsys, temperature):
    data = ("--prompts", models / "prompts.jsonl", *LENGTH, "--temperature", temperature, "--reference")
    found, replies = evaluated(capsys, tmp_path / "a.json", models / "model", *data, models / "uniform")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models / "model"), AutoTokenizer.from_pretrained(models / "model")
    ratios, spelt_out = [], [row for row in replies if spelt(row["model"])]
    for row in spelt_out:
        prompt = tokenizer(row["prompt"])["input_ids"]
        reply = [*tokenizer(row["model"]["response"])["input_ids"], *([END] if row["model"]["finished"] else [])]
        with torch.no_grad():
            logprobs = (model(torch.tensor([prompt + reply])).logits[0] / temperature).log_softmax(-1)
        own = sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(reply))
        ratios.append(own + len(reply) * math.log(10))
    kl = found["figures"]["model"]["kl"]
    assert kl["low"] < kl["mean"] < kl["high"]
    assert kl["mean"] == pytest.approx(mean(row["model"]["kl"] for row in replies))
    assert [row["model"]["kl"] for row in spelt_out] == pytest.approx(ratios, abs=1e-4)
    assert len(ratios) > 10
    itself, _ = evaluated(capsys, tmp_path / "b.json", models / "model", *data, models / "model")
    assert itself["figures"]["model"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_reference_computes_in_the_same_precision(models, tmp_path, capsys, precision):
    """From itself a policy is nowhere away; from one that computes otherwise it would be."""
    data = (models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--reference")
    itself, _ = evaluated(capsys, tmp_path / "a.json", *data, models / "model", "--precision", precision)
    assert itself["figures"]["model"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    other, in_fp32 = (
        evaluated(capsys, tmp_path / "b.json", *data, models / "worse", "--precision", one)[0]["figures"]["model"]["kl"]
        for one in (precision, "fp32")
    )
    assert other != in_fp32


def test_the_replies_to_some_prompts_are_theirs_in_all_columns():
    prompts = [PromptExample(index, [index], Row(f"a:{index}", {}, {})) for index in (4, 7, 9)]
    samples = Samples([[4], [7], [9]], [[14], [17], [19]], [[0.4], [0.7], [0.9]], [True, False, True], 0)
    own = Answered(prompts, samples, ["four", "seven", "nine"], None, torch.tensor([4.0, 7.0, 9.0]))  # type: ignore[arg-type]
    found = own.only({9, 7, 8})
    assert found.logprobs is not None
    assert found.logprobs.tolist() == [7.0, 9.0]
    assert (found.texts, found.samples.responses, found.samples.finished) == (["seven", "nine"], [[17], [19]], [False, True])
    assert [prompt.index for prompt in found.prompts] == [7, 9]
    assert own.only({4, 7, 9}) is own


def test_a_stop_token_that_is_a_word_is_in_no_text(models, tmp_path, capsys):
    """Replies, a function and a judge have what `rlhf generate` writes."""
    (tmp_path / "mine.py").write_text("def told(responses):\n    return [float('d' in r.split()) for r in responses]\n")
    data = (models / "stops", "--prompts", models / "prompts.jsonl", *LENGTH, "--reward", f"{tmp_path / 'mine.py'}:told")
    found, replies = evaluated(capsys, tmp_path / "a.json", *data)
    same = generated(tmp_path / "r.jsonl", models / "stops", "--data", models / "prompts.jsonl", *LENGTH)
    capsys.readouterr()
    assert [row["model"]["response"] for row in replies] == [row["response"] for row in same]
    assert found["figures"]["model"]["reward"]["mean"] == 0
    without, _ = evaluated(capsys, tmp_path / "b.json", models / "model", *data[1:])
    assert without["figures"]["model"]["reward"]["mean"] > 0
    assert found["figures"]["model"]["ended"]["mean"] > without["figures"]["model"]["ended"]["mean"]


def test_the_win_rate_is_counted(models, tmp_path, capsys):
    data = ("--prompts", models / "prompts.jsonl", *LENGTH, "--reward", "count:a", "--against")
    found, replies = evaluated(capsys, tmp_path / "a.json", models / "model", *data, models / "uniform")
    signs = [
        (mine > theirs) - (mine < theirs)
        for mine, theirs in ((words_of(row).count("a"), row["against"]["response"].split().count("a")) for row in replies)
    ]
    rate = (signs.count(1) + signs.count(0) / 2) / 29
    low, high = wilson(29 * rate, 29)
    assert found["wins"]["reward"] == pytest.approx(
        {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
        | {"wins": signs.count(1), "ties": signs.count(0), "losses": signs.count(-1)},
        rel=1e-5,
    )
    assert min(signs.count(1), signs.count(0), signs.count(-1)) > 0
    back, _ = evaluated(capsys, tmp_path / "b.json", models / "uniform", *data, models / "model")
    assert back["wins"]["reward"]["win_rate"] == pytest.approx(1 - rate)
    same, replies = evaluated(capsys, tmp_path / "c.json", models / "model", *data, models / "model")
    assert same["wins"]["reward"]["ties"] == 29
    assert all(row["model"] == row["against"] for row in replies)


def replied(*texts: str) -> Answered:
    samples = Samples([[1]] * len(texts), [[2]] * len(texts), [[0.0]] * len(texts), [True] * len(texts), 0)
    return Answered([], samples, list(texts), None, None)  # type: ignore[arg-type]


def scores(*values: float) -> Scores:
    found = torch.tensor(values)
    return Scores(found, ~found.isnan(), {})


def test_wins_by_hand():
    """A win, a loss, a tie of scores, the same reply with scores a rounding apart, and two that cannot be compared."""
    answers = {"model": replied("a", "b", "c", "d", "e", "f"), "against": replied("x", "x", "x", "d", "x", "x")}
    nan = math.nan
    found = wins(answers, {"model": scores(2, 0, 1, 1, nan, 1), "against": scores(1, 1, 1, 1.000001, 0, nan)}, None)
    low, high = wilson(2, 4)
    assert found == {
        "reward": {"win_rate": 0.5, "win_rate_low": pytest.approx(low), "win_rate_high": pytest.approx(high)}
        | {"wins": 1, "ties": 2, "losses": 1}
    }
    others = {"model": answers["model"], "against": replied(*"xxxxxx")}
    found = wins(others, {"model": scores(2, 0, 1, 1, nan, 1), "against": scores(1, 1, 1, 1.000001, 0, nan)}, None)
    assert (found["reward"]["ties"], found["reward"]["losses"]) == (1, 2)  # other replies: the rounding counts


def test_a_judge_decides(models, tmp_path, capsys):
    data = (models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--against", models / "worse")
    found, replies = evaluated(capsys, tmp_path / "a.json", *data, "--judge", judge(tmp_path, LONGER))
    longer_by = [len(row["model"]["response"]) - len(row["against"]["response"]) for row in replies]
    outcomes = [1.0 if by > 0 else 0.5 if by == 0 else 0.0 for by in longer_by]
    assert [row["judged"] for row in replies] == outcomes
    assert 0 < mean(outcomes) < 1
    wins = found["wins"]["judge"]
    assert wins["win_rate"] == pytest.approx(mean(outcomes))
    assert (wins["agreed"], wins["first"]) == (wins["asked"], 0.5)
    assert wins["asked"] == sum(row["model"]["response"] != row["against"]["response"] for row in replies)


def test_what_was_sampled_is_there_if_the_judge_fails(models, tmp_path, capsys):
    """And what was scored; a second answer replaces nothing."""
    words = [models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--against", models / "worse"]
    words += ["--reward", "count:a", "--output", tmp_path / "a.json", "--judge", judge(tmp_path, "sys.exit('no key')")]
    assert main(["eval", *map(str, words)]) == 65
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{tmp_path / 'a.json'}: has replies and scores; the judge is asked now" in printed.err
    kept = json.loads((tmp_path / "a.json").read_text())
    assert list(kept["wins"]) == ["reward"]
    assert all({"response", "score"} <= row["against"].keys() for row in kept["replies"])
    whole, replies = evaluated(capsys, tmp_path / "a.json", *words[:-4], "--judge", judge(tmp_path, LONGER))
    assert list(whole["wins"]) == ["reward", "judge"]
    assert [{k: v for k, v in row.items() if k != "judged"} for row in replies] == kept["replies"]


def test_the_table_in_words(models, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def long(responses):\n    return [None if len(r) < 3 else len(r) for r in responses]\n")
    words = [models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--against", models / "worse"]
    words += ["--reward.sources.long.source", f"{tmp_path / 'mine.py'}:long", "--reward.sources.a.source", "count:a"]
    words += ["--judge", judge(tmp_path, LONGER), "--reference", models / "uniform"]
    assert main(["eval", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "a policy on 29 prompts of" in lines[0]
    assert lines[0].endswith("few prompts: says little")
    assert [line.split()[0] for line in lines[2:8]] == ["reward", "reward/long", "reward/a", "length", "ended", "kl"]
    assert "replies have no score from one source or more: they are not in the mean `reward`" in lines[8]
    assert lines[9].startswith("by the reward its reply is better in 0.")
    assert lines[10].startswith("by the judge its reply is better in 0.")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("critic --prompts prompts.jsonl", 65, "this is a reward model, not a policy"),
        ("model --prompts none.jsonl", 65, "none.jsonl"),
        ("model --data sft.jsonl --reward critic", 78, "reward scores replies to prompts"),
        ("model --prompts prompts.jsonl --against worse", 78, "against needs somebody to say which reply is better"),
        ("model --prompts prompts.jsonl --judge cat", 78, "judge compares replies of two policies: give against"),
        ("model --prompts prompts.jsonl --against worse --judge no-such-judge", 78, "there is no command 'no-such-judge'"),
        ("model --prompts prompts.jsonl --against worse --judge.timeout_s 3", 78, "timeout_s has no meaning without a command"),
        ("model --prompts prompts.jsonl --reward.timeout_s 3", 78, "neither is given: give --reward SOURCE"),
        ("model --prompts prompts.jsonl --base worse", 78, "base is compared on held-out rows"),
        ("model --prompts prompts.jsonl --reference worse --temperature 0", 78, "temperature 0 draws none"),
        ("model --prompts prompts.jsonl --precision both", 78, "precision `both` is for one model on held-out rows"),
        ("model --prompts prompts.jsonl --data.loss-on all", 78, "data.loss_on: prompts are given"),
        ("model --prompts prompts.jsonl --reference other", 65, "the tokenizer of the reference other is not"),
        ("model --prompts prompts.jsonl --reward verify:exact", 65, "verify:exact: asks for answer"),
        (
            "model --prompts prompts.jsonl --reward mine.py:nothing --max-new-tokens 5",
            1,
            "prompts.jsonl:1: the score of its reply is nan",
        ),
        ("model --prompts prompts.jsonl --max-new-tokens 64", 65, "lower data.max_length or max_new_tokens"),
        ("nan --prompts prompts.jsonl --max-new-tokens 5", 1, "nan: a logit after the prompt '"),
        ("model --prompts prompts.jsonl --max-new-tokens 5 --reference nan", 1, "nan: 29 of the 29 numbers"),
        ("model --prompts prompts.jsonl --max-new-tokens 5 --temperature 1e-40", 1, "temperature or repetition_penalty is too"),
        ("model --prompts prompts.jsonl --reference model --precision both", 78, "rows, without prompts and reference: give"),
    ],
)
def test_a_mistake_is_one_message(models, tmp_path, monkeypatch, capsys, words, code, message):
    for name in ("model", "worse", "other", "nan", "critic", "sft.jsonl", "prompts.jsonl"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "mine.py").write_text("def nothing(responses):\n    return [float('nan')] * len(responses)\n")
    monkeypatch.chdir(tmp_path)
    assert shutil.which("no-such-judge") is None
    assert main(["eval", *words.split()]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("rlhf: error: ") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reference short", "positions, the reference short has 8: lower data.max_length or max_new_tokens"),
        ("--reference nowhere", "nowhere: no such model"),
        ("--reward nowhere", "nowhere: no such model"),
        ("--reward critic --against nowhere", "nowhere: no such model"),
        ("--reward.sources.a.source critic --reward.sources.b.source nowhere", "nowhere: no such model"),
        ("--reward count:zebra", "no single token of this tokenizer reads 'zebra'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sampled(models, monkeypatch, capsys, words, message):
    monkeypatch.chdir(models)
    assert main(["eval", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "5", *words.split()]) == 65
    said = capsys.readouterr().err
    assert message in said
    assert "replies to 29 prompts" not in said
    assert main(["eval", "model", "--prompts", "prompts.jsonl", "--max-new-tokens", "5"]) == 0
    assert "replies to 29 prompts" in capsys.readouterr().err


def test_policies_with_other_tokenizers_are_compared_by_text(models, tmp_path, capsys):
    """`other` has one more token, which the reward model has not: it is told what was said, and hears no unknown word."""
    words = (models / "model", "--prompts", models / "prompts.jsonl", *LENGTH, "--against", models / "other")
    found, replies = evaluated(capsys, tmp_path / "a.json", *words, "--reward", models / "critic")
    rows = [
        {"prompt": row["prompt"], "response": f" {row['against']['response']}", "score": row["against"]["score"]}
        for row in replies
        if row["against"]["finished"] and spelt(row["against"])
    ]
    assert len(rows) >= 4
    assert [row["score"] for row in rows] == pytest.approx(own_scores(models / "critic", rows, "response"), abs=1e-4)
    assert found["prompts"] == 29
