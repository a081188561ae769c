"""`rlhf generate` and `rlhf eval`, against transformers' own forward, loss and generate."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.cli import main
from rlhf.report import console

END = 1


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluated(capsys, *words: object) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def generated(file: Path, *words: object) -> list[dict]:
    assert main(["generate", *map(str, words), "--output", str(file)]) == 0
    return rows_of(file)


def own_loss(directory: Path, rows: list[dict], on_prompt: bool) -> tuple[float, int]:
    """(mean loss per token, tokens), row by row without pads, by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for row in rows:
        prompt, reply = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], END]
        labels = torch.tensor([(prompt if on_prompt else [-100] * len(prompt)) + reply])
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(torch.tensor([prompt + reply]), labels=labels).loss) * tokens
        count += tokens
    return total / count, count


@pytest.mark.parametrize("loss_on", ["responses", "all"])
def test_loss_and_perplexity_are_transformers_own(llamas, capsys, loss_on):
    found = evaluated(capsys, llamas / "model", "--data", llamas / "sft.jsonl", "--data.loss-on", loss_on, "--batch-size", 5)
    loss, tokens = own_loss(llamas / "model", rows_of(llamas / "sft.jsonl"), loss_on == "all")
    other, _ = own_loss(llamas / "model", rows_of(llamas / "sft.jsonl"), loss_on != "all")
    assert (found["kind"], found["rows"], found["tokens"]) == ("policy", 37, tokens)
    assert found["figures"]["fp32"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["figures"]["fp32"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert abs(loss - other) > 1e-3  # the two are told apart


def test_plain_text(llamas, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text('{"text": "a b c d"}\n{"text": "e f"}\n')
    found = evaluated(capsys, llamas / "model", "--data", tmp_path / "text.jsonl", "--json_key", "text")
    as_rows = [{"prompt": "a b c d", "completion": ""}, {"prompt": "e f", "completion": ""}]
    loss, tokens = own_loss(llamas / "model", as_rows, on_prompt=True)
    assert found["tokens"] == tokens == 6
    assert found["figures"]["fp32"]["loss"] == pytest.approx(loss, rel=1e-5)


def own_scores(directory: Path, rows: list[dict], side: str) -> list[float]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return [float(model(torch.tensor([[*tokenizer(row["prompt"] + row[side])["input_ids"], END]])).logits) for row in rows]


def test_accuracy_is_counted(llamas, capsys):
    found = evaluated(capsys, llamas / "critic", "--data", llamas / "pairs.jsonl", "--batch-size", 5)
    rows = rows_of(llamas / "pairs.jsonl")
    chosen, rejected = own_scores(llamas / "critic", rows, "chosen"), own_scores(llamas / "critic", rows, "rejected")
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    figures = found["figures"]["fp32"]
    assert 0 < right < 37
    assert (found["kind"], found["pairs"]) == ("reward model", 37)
    assert figures["accuracy"] == right / 37
    assert figures["margin"] == pytest.approx(sum(chosen) / 37 - sum(rejected) / 37, abs=1e-5)
    longer = sum(
        (len(row["chosen"]) > len(row["rejected"])) + 0.5 * (len(row["chosen"]) == len(row["rejected"])) for row in rows
    )
    assert found["longer_wins"] == longer / 37
    z, p = 1.959964, right / 37  # Wilson's bounds are the rates that are z of their own deviations away
    for bound in (figures["accuracy_low"], figures["accuracy_high"]):
        assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 37), rel=1e-5)
    assert figures["accuracy_low"] < p < figures["accuracy_high"]


@pytest.mark.parametrize(("part", "data"), [("model", "sft"), ("critic", "pairs")])
def test_both_is_each_of_them(llamas, capsys, part, data):
    words = (llamas / part, "--data", llamas / f"{data}.jsonl", "--precision")
    both, plain, in_fp8 = (evaluated(capsys, *words, precision) for precision in ("both", "fp32", "fp8"))
    assert list(both["figures"]) == ["fp32", "fp8"]
    assert both["figures"] == plain["figures"] | in_fp8["figures"]
    for name, difference in both["difference"].items():
        assert difference == both["figures"]["fp8"][name] - both["figures"]["fp32"][name]
    assert both["difference"]["loss"] != 0
    assert 0 < both["drift"]["mean"] < both["drift"]["max"] < 1


def test_there_is_no_drift_where_the_forward_product_is_not_in_fp8(llamas, capsys):
    found = evaluated(
        capsys, llamas / "model", "--data", llamas / "sft.jsonl", "--precision", "both", "--fp8.high-precision", "fprop"
    )
    assert found["drift"] == {"mean": 0, "max": 0}
    assert found["difference"] == {"loss": 0, "perplexity": 0}


def test_drift_is_that_of_the_tokens(llamas, capsys):
    """Against the same layers put in by hand, and the mean and maximum taken over single forwards."""
    from rlhf.config.sections import Fp8
    from rlhf.fp8.apply import apply

    found = evaluated(
        capsys, llamas / "model", "--data", llamas / "sft.jsonl", "--precision", "both", "--fp8.recipe", "rowwise"
    )
    models = [AutoModelForCausalLM.from_pretrained(llamas / "model") for _ in range(2)]
    apply(models[1], Fp8(recipe="rowwise"))
    tokenizer, moved = AutoTokenizer.from_pretrained(llamas / "model"), []
    for row in rows_of(llamas / "sft.jsonl"):
        prompt, reply = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], END]
        ids = torch.tensor([prompt + reply])
        with torch.no_grad():
            plain, in_fp8 = (model(ids).logits[0].log_softmax(-1) for model in models)
        for place in range(len(prompt), ids.shape[1]):
            moved.append(float((in_fp8 - plain)[place - 1, ids[0, place]].abs()))
    assert found["drift"]["mean"] == pytest.approx(sum(moved) / len(moved), rel=0.02)
    assert found["drift"]["max"] == pytest.approx(max(moved), rel=0.02)


def test_the_head_that_makes_logits_stays(llamas, tmp_path, capsys):
    """With 16 words it could be in FP8; 7 matrices a layer are."""
    shutil.copytree(llamas / "model", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(llamas / "model")
    model.resize_token_embeddings(16)
    model.save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--data", str(llamas / "sft.jsonl"), "--precision", "fp8"]) == 0
    assert "14 linear layers in FP8, recipe block, backend reference" in capsys.readouterr().err


def test_bf16_is_autocast(llamas, capsys):
    found = evaluated(capsys, llamas / "model", "--data", llamas / "sft.jsonl", "--precision", "bf16")
    beside = evaluated(capsys, llamas / "model", "--data", llamas / "sft.jsonl", "--precision", "both", "--plain", "bf16")
    loss, _ = own_loss(llamas / "model", rows_of(llamas / "sft.jsonl"), on_prompt=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = own_loss(llamas / "model", rows_of(llamas / "sft.jsonl"), on_prompt=False)
    assert found["figures"]["bf16"]["loss"] == pytest.approx(expected, abs=2e-3)
    assert found["figures"]["bf16"]["loss"] != pytest.approx(loss, abs=1e-6)
    assert beside["figures"]["bf16"] == found["figures"]["bf16"]


@pytest.mark.parametrize("recipe", ["delayed", "current", "mxfp8"])
def test_every_recipe(llamas, capsys, recipe):
    words = ("--data", llamas / "sft.jsonl", "--precision", "both", "--fp8.recipe", recipe)
    assert 0 < evaluated(capsys, llamas / "model", *words)["drift"]["mean"] < 0.1


def test_the_table_in_words(llamas, capsys):
    assert main(["eval", str(llamas / "critic"), "--data", str(llamas / "pairs.jsonl"), "--precision", "both"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"a reward model, 37 pairs of {llamas / 'pairs.jsonl'}")
    assert lines[1].split() == ["fp32", "fp8", "difference"]
    assert [line.split()[0] for line in lines[2:8]] == ["accuracy", "accuracy_low", "accuracy_high", "loss", "margin", "score"]
    assert "FP8 moves the score of a reply by" in lines[-1]


def test_greedy_replies_are_transformers_own(llamas, tmp_path):
    prompts = [{"prompt": row["prompt"], "id": number} for number, row in enumerate(rows_of(llamas / "prompts.jsonl"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    words = (llamas / "model", "--data", tmp_path / "prompts.jsonl", "--temperature", 0, "--max-new-tokens", 9)
    found = generated(tmp_path / "replies.jsonl", *words, "--batch-size", 4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llamas / "model"), AutoTokenizer.from_pretrained(llamas / "model")
    for row, reply in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)[
            0, ids.shape[1] :
        ]
        text = tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert reply == {**row, "response": text, "finished": int(expected[-1]) == END}
        assert list(reply) == ["prompt", "id", "response", "finished"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_reply_follows_from_the_seed_alone(llamas, tmp_path):
    words = (llamas / "model", "--data", llamas / "prompts.jsonl", "--max-new-tokens", 9, "--seed")
    first = generated(tmp_path / "a.jsonl", *words, 1)
    assert generated(tmp_path / "b.jsonl", *words, 1, "--batch-size", 3) == first
    assert generated(tmp_path / "c.jsonl", *words, 2) != first


def test_replies_of_both_precisions(llamas, tmp_path, capsys):
    words = (llamas / "model", "--data", llamas / "prompts.jsonl", "--max-new-tokens", 9, "--precision")
    both = generated(tmp_path / "both.jsonl", *words, "both", "--json")
    summary = json.loads(capsys.readouterr().out)
    plain, in_fp8 = (generated(tmp_path / f"{one}.jsonl", *words, one) for one in ("fp32", "fp8"))
    assert list(both[0]) == ["prompt", "response_fp32", "finished_fp32", "response_fp8", "finished_fp8"]
    for row, one, other in zip(both, plain, in_fp8, strict=True):
        assert (row["response_fp32"], row["finished_fp32"]) == (one["response"], one["finished"])
        assert (row["response_fp8"], row["finished_fp8"]) == (other["response"], other["finished"])
    same = sum(one["response"] == other["response"] for one, other in zip(plain, in_fp8, strict=True))
    assert summary["same"] == same < summary["replies"] == len(both)
    assert summary["finished"] == {"fp32": sum(row["finished"] for row in plain), "fp8": sum(row["finished"] for row in in_fp8)}
    words = (*words, "both", "--fp8.high-precision", "fprop")
    assert all(row["response_fp32"] == row["response_fp8"] for row in generated(tmp_path / "control.jsonl", *words))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("eval none/such/model --data sft.jsonl", 65, "none/such/model: no such model"),
        ("eval model --data none.jsonl", 65, "none.jsonl"),
        ("eval model --data pairs.jsonl", 65, "pairs.jsonl:1: unknown columns 'chosen', 'rejected'"),
        ("eval model --data sft.jsonl --fp8.recipe none", 78, "--fp8.recipe: given `none`, expected `delayed`, `current`"),
        ("eval model --data sft.jsonl --plain bf16", 78, "plain `bf16` is for precision `fp8` and `both`"),
        ("eval model --data sft.jsonl --precision fp8 --fp8.keep *.nothing", 78, "'*.nothing' matches no layer"),
        ("eval model --dat sft.jsonl", 78, "--dat: unknown flag; did you mean `--data"),
        ("eval model model --data sft.jsonl", 2, "`model`: expected a flag"),
        ("eval model", 78, "neither is given: give --data or --prompts"),
        ("eval critic --data pairs.jsonl --data.loss-on all", 78, "data.loss_on: critic is a reward model"),
        ("eval gpt2 --data sft.jsonl --precision both", 78, "no layer of GPT2LMHeadModel can run in FP8"),
        ("generate model --data prompts.jsonl --output prompts.jsonl", 73, "prompts.jsonl: is there already"),
        ("generate model --data prompts.jsonl --output no/such/replies.jsonl", 73, "there is no directory no/such"),
        ("generate critic --data prompts.jsonl --output replies.jsonl", 65, "this is a reward model, not a policy"),
        ("generate model --data clash.jsonl --output replies.jsonl", 65, "clash.jsonl:1: has a column 'finished'"),
        ("generate model --data prompts.jsonl --output replies.jsonl --max-new-tokens 64", 65, "the model has 64: lower"),
        ("generate model --data prompts.jsonl --output replies.jsonl --temperature -1", 78, "expected a number, at least 0"),
    ],
)
def test_a_mistake_is_one_message(llamas, world, tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "critic", "sft.jsonl", "pairs.jsonl", "prompts.jsonl"):
        (tmp_path / name).symlink_to(llamas / name)
    (tmp_path / "gpt2").symlink_to(world / "model")
    (tmp_path / "clash.jsonl").write_text('{"prompt": "a b", "finished": true}\n')
    assert main(words.split()) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("rlhf: error: ") == 1
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "replies.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "counts"),
    [
        ("eval model --data sft.jsonl --batch-size 10", ["10 of 37 rows", "37 of 37 rows"]),
        ("eval critic --data pairs.jsonl --batch-size 10", ["10 of 37 rows", "37 of 37 rows"]),
        ("eval model --data pairs.jsonl --reference model --batch-size 20", ["20 of 37 rows", "37 of 37 rows"]),
        ("score critic pairs.jsonl --output FILE --batch-size 60", ["60 of 74 scores", "74 of 74 scores"]),
        ("score FILE.py:f pairs.jsonl --output FILE", ["74 of 74 scores"]),
        ("generate model --data prompts.jsonl --output FILE --max-new-tokens 2", ["29 of 29 replies"]),
        (
            "eval model --prompts prompts.jsonl --reference model --reward critic --max-new-tokens 2",
            ["29 of 29 replies", "16 of 29 scores", "29 of 29 scores"],
        ),
    ],
)
def test_how_far_it_is_is_told(llamas, tmp_path, capsys, monkeypatch, command, counts):
    """To standard error, of files of 37 rows and 29 prompts; and nothing of what is over within half a minute."""
    monkeypatch.chdir(llamas)
    for name in ("quick", "told"):
        (tmp_path / f"{name}.jsonl.py").write_text("def f(responses):\n    return [1.0] * len(responses)\n")
    words = command.replace("FILE", str(tmp_path / "quick.jsonl")).split()
    assert main([*words, "--json"]) == 0
    assert " left\n" not in capsys.readouterr().err
    monkeypatch.setattr(console, "COUNTED_EVERY_SECONDS", -1.0)
    words = command.replace("FILE", str(tmp_path / "told.jsonl")).split()
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    json.loads(told.out)
    for count in counts:
        assert f"%  {count}  " in told.err
