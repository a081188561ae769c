"""`rlhf compare`: two equal runs are equal, and a planted difference is named where it is."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from harness import flags, run
from safetensors.torch import load_file, save_file

from rlhf.cli import main


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Two runs that are the same, one of another learning rate, one that is shorter."""
    places = tmp_path_factory.mktemp("compared")
    for name, changed in (("a", {}), ("b", {}), ("lr", {"optimizer__lr": 3e-3}), ("short", {"schedule__length": 2})):
        log = places / f"{name}.log"
        assert run("sft", flags("sft", world, places / name, **changed), log) == 0, log.read_text()
    return places


def compare(*words: object, capsys) -> tuple[int, dict]:
    code = main(["compare", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_made_twice_is_equal(runs, capsys):
    code, found = compare(runs / "a", runs / "b", capsys=capsys)
    assert (code, found["equal"], found["made_of"], found["first"]) == (0, True, [], None)
    assert compare(runs / "a", runs / "b", "--weights", capsys=capsys)[0] == 0


def test_another_learning_rate_is_named_and_where_it_shows(runs, capsys):
    code, found = compare(runs / "a", runs / "lr", capsys=capsys)
    assert code == 1
    assert [part["name"] for part in found["made_of"]] == ["optimizer.lr"]
    assert found["made_of"][0]["other"] == 3e-3
    assert found["first"]["name"] == "step 1: optimizer/lr"
    code, found = compare(runs / "a", runs / "lr", "--weights", capsys=capsys)
    assert code == 1
    assert found["differing"]


def test_a_metric_that_was_changed_is_found_at_its_step(runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "c")
    file = tmp_path / "c" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = next(line for line in lines if line["step"] == 3 and "loss" in line)
    changed["loss"] += 1e-12
    changed["time/step_s"] = 1e9
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = compare(runs / "a", tmp_path / "c", capsys=capsys)
    assert (code, found["first"]["name"], found["made_of"]) == (1, "step 3: loss", [])


def test_the_same_run_of_parents_elsewhere_is_equal(runs, world, tmp_path, capsys):
    """A second stage, which reads the first one's model by another path."""
    for name in ("a", "b"):
        words = [word for word in flags("sft", world, tmp_path / name, schedule__length=2) if not word.startswith("--model=")]
        words.append(f"--model={runs / name}")
        assert run("sft", words, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    code, found = compare(tmp_path / "a", tmp_path / "b", capsys=capsys)
    assert (code, found["made_of"]) == (0, [])


def test_an_evaluation_that_only_one_has_is_named(runs, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "c")
    file = tmp_path / "c" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = next(place for place, line in enumerate(lines) if line["step"] == 2 and "tokens" in line)
    lines.insert(at + 1, {"step": 2, "eval/loss": 1.0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = compare(runs / "a", tmp_path / "c", capsys=capsys)
    assert (code, found["first"]) == (1, {"name": "step 2: evaluation", "one": "none", "other": "recorded"})


def test_a_shorter_run_is_said_to_be_one(runs, capsys):
    code, found = compare(runs / "a", runs / "short", capsys=capsys)
    assert (code, found["steps"]) == (1, [4, 2])
    assert "schedule.length" in [part["name"] for part in found["made_of"]]


def test_tensors_by_hand(tmp_path, capsys):
    one = {
        "same": torch.ones(3),
        "moved": torch.tensor([3.0, 4.0]),
        "gone": torch.zeros(1),
        "typed": torch.ones(2),
        "cut": torch.ones(4),
        "scale": torch.tensor(1.0),
        "broken": torch.tensor([1.0, float("nan")]),
    }
    other = {"same": torch.ones(3), "moved": torch.tensor([3.0, 4.5]), "new": torch.zeros(1), "typed": torch.ones(2).bfloat16(),
             "cut": torch.ones(2), "scale": torch.tensor(1.0), "broken": torch.tensor([1.0, 2.0])}  # fmt: skip
    for name, tensors in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    code, found = compare(tmp_path / "one", tmp_path / "other", capsys=capsys)
    assert code == 1
    told = {part["name"]: part for part in found["differing"]}
    assert (found["tensors"], found["equal_tensors"]) == (8, 2)
    assert told["moved"]["largest"] == 0.5
    assert told["moved"]["relative"] == pytest.approx(0.1)
    assert told["gone"]["what"] == "only in the first"
    assert told["new"]["what"] == "only in the second"
    assert "float32 and bfloat16" in told["typed"]["what"]
    assert told["broken"]["what"] == "NaN or infinity in 1 and 0 of 2 places"
    assert told["cut"]["what"] == "shape [4] and [2]"


def test_a_nan_is_equal_to_itself_and_minus_zero_not_to_zero(tmp_path, capsys):
    for name, zero in (("one", 0.0), ("other", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"nan": torch.tensor([float("nan")]), "zero": torch.tensor([zero])}, tmp_path / name / "model.safetensors")
    assert [part["name"] for part in compare(tmp_path / "one", tmp_path / "other", capsys=capsys)[1]["differing"]] == ["zero"]


def test_a_saved_model_that_was_touched(runs, tmp_path, capsys):
    shutil.copytree(runs / "a" / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = sorted(tensors)[2]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    code, found = compare(runs / "a" / "model", tmp_path / "model", capsys=capsys)
    assert (code, [part["name"] for part in found["differing"]]) == (1, [name])


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [(["a", "nowhere"], 65, "nowhere: no such directory"), (["a", "a/model"], 2, "--weights"), (["a"], 2, "required")],
)
def test_mistakes_are_one_message(words, code, told, runs, capsys):
    assert main(["compare", *(str(runs / word) for word in words)]) == code
    assert told in capsys.readouterr().err


def test_the_run_json_of_another_tool_makes_no_run(runs, tmp_path, capsys):
    """Beside a model, or in a directory of it; and of two such models."""
    for name in ("one", "other"):
        shutil.copytree(runs / "a" / "model", tmp_path / name)
        for place in (tmp_path / name, tmp_path / name / "logs"):
            place.mkdir(exist_ok=True)
            (place / "run.json").write_text('{"run": 1}')
    assert compare(tmp_path / "one", tmp_path / "other", capsys=capsys)[0] == 0
    assert compare(runs / "a", tmp_path / "other", "--weights", capsys=capsys)[0] == 0
    (tmp_path / "one" / "run.json").unlink()
    assert compare(tmp_path / "one", tmp_path / "other", capsys=capsys)[0] == 0


def test_of_many_tensors_the_first_are_shown(tmp_path, capsys):
    """What only one side has is no smaller difference."""
    for name, count in (("one", 12), ("other", 0)):
        (tmp_path / name).mkdir()
        save_file({f"t{n}": torch.ones(1) for n in range(count)} | {"same": torch.ones(1)}, tmp_path / name / "m.safetensors")
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "other")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "  and 2 more (--json has all)"


def test_what_cannot_be_compared_is_named(runs, tmp_path, capsys):
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(runs / "a", tmp_path / "pipeline" / "sft")
    for words, said in (
        ((tmp_path / "pipeline", tmp_path / "pipeline"), "is a pipeline: compare its stages one by one (sft)"),
        ((runs / "a", runs / "a" / "model"), f"{runs / 'a' / 'model'} is no run and the other is"),
        ((runs / "a" / "model", runs / "a"), f"{runs / 'a' / 'model'} is no run and the other is"),
    ):
        assert main(["compare", *map(str, words)]) == 2
        assert said in capsys.readouterr().err
