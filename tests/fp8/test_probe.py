"""`rlhf fp8 probe`: its figures by hand, what a run of it is, and the command's words."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch

from rlhf.cli import main
from rlhf.config.parse import parse
from rlhf.config.sections import TrainingFp8
from rlhf.training.fp8 import probe as module
from rlhf.training.fp8.probe import Trajectory, judged, probe, seed_band
from rlhf.training.fp8.sft import with_fp8


def trajectory(late: float, drift: float = 0.0, gradient: tuple[float, float] = (1.0, 0.0)) -> Trajectory:
    """Losses far off in the first half, which must not count."""
    return Trajectory([99.0, 99.0, late - 0.1, late + 0.1], torch.tensor(gradient), torch.full((2,), drift - 1), -torch.ones(2))


def test_the_figures_by_hand():
    plain, fp8 = [trajectory(2.0), trajectory(2.2)], [trajectory(2.1, 0.5), trajectory(2.2, -0.5, (1.0, 1.0))]
    assert seed_band(plain) == pytest.approx(math.sqrt(0.02) / 2.1)  # 0.1 off the mean each, over n - 1
    verdict = judged("block", plain, fp8)
    assert verdict.gap == pytest.approx(0.1 / 2.0 / 2)
    assert verdict.gaps == pytest.approx([0.05, 0.0])
    assert verdict.gradient_cosine == pytest.approx(1 / math.sqrt(2))
    assert (verdict.logprob_drift, verdict.largest_logprob_drift) == pytest.approx((0.5, 0.5))
    assert verdict.ratio_drift == pytest.approx(math.exp(0.5))
    assert verdict.within


@pytest.mark.parametrize(("late", "within"), [(2.003, True), (1.997, True), (2.005, False), (1.995, False)])
def test_without_a_band_the_bound_is_two_in_a_thousand(late, within):
    assert judged("block", [trajectory(2.0)] * 2, [trajectory(late)] * 2).within == within


def arguments(files, *more: str) -> list[str]:
    return ["--model", str(files / "model"), "--data", str(files / "rows.jsonl"), "--batch_size", "8",
            "--micro_batch_size", "4", "--optimizer.lr", "1e-3", *more]  # fmt: skip


def test_the_same_batches_learn_alike(subject_files):
    config = parse("sft", [*arguments(subject_files), "--output", os.devnull]).config
    told: list[tuple[str, int]] = []
    verdicts = probe(config, 6, 2, ["rowwise", "current"], lambda run, step, loss: told.append((run, step)))
    assert [run for run, step in told if step == 0] == [
        f"{name}, seed {seed}" for name in ("without FP8", "rowwise", "current") for seed in (0, 1)
    ]
    assert len(told) == 6 * 2 * 3
    for verdict in verdicts:
        assert 0 < abs(verdict.gap) < 0.02
        assert 0.95 < verdict.gradient_cosine < 1
        assert 0 < verdict.logprob_drift <= verdict.largest_logprob_drift
        assert verdict.ratio_drift > 1
        assert verdict.seed_band > 0


def test_options_that_one_of_the_compared_recipes_has_are_left_to_it(subject_files):
    config = parse("sft", [*arguments(subject_files), "--output", os.devnull, "--fp8.recipe=delayed"]).config
    config = with_fp8(config, amax_history=16)
    assert with_fp8(config, recipe="block").fp8 == TrainingFp8(recipe="block")
    assert with_fp8(config, recipe="delayed").fp8.amax_history == 16
    words = ["fp8", "probe", *arguments(subject_files), "--steps", "1", "--seeds", "1", "--json"]
    assert main([*words, "--recipes", "delayed,block", "--fp8.amax_history", "16"]) in (0, 1)


def test_without_fp8_there_is_no_gap_and_a_worse_run_fails(subject_files, monkeypatch, capsys):
    words = ["fp8", "probe", *arguments(subject_files), "--steps", "4", "--seeds", "1", "--recipe", "block", "--json"]
    products = ("--fp8.high_precision", "fprop,dgrad,wgrad")
    assert main([*words, *products]) == 78  # no layer is left
    capsys.readouterr()
    advance = module.advance

    def spoiled(policy):
        advance(policy)
        for layer in policy.modules():
            if getattr(layer, "is_fp8", False):
                layer.weight.data.mul_(0.5)

    assert main([*words[:-1], "--data.max_length", "64", "--json"]) in (0, 1)
    capsys.readouterr()
    monkeypatch.setattr(module, "advance", spoiled)
    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)["recipes"][0]
    assert abs(found["gap"]) > found["bound"] == 2e-3


def test_the_other_commands(subject_files, tmp_path, capsys):
    model, data = str(subject_files / "model"), ["--data", str(subject_files / "rows.jsonl"), "--rows", "8"]
    assert main(["fp8", "plan", model, "--fp8.keep", "*.down_proj:wgrad", "--json"]) == 0
    layers = {one["name"]: one for one in json.loads(capsys.readouterr().out)["layers"]}
    assert len(layers) == 3 * 7 + 2
    assert layers["model.layers.0.mlp.down_proj"]["high_precision"] == ["wgrad"]
    assert not layers["lm_head"]["in_fp8"]
    assert main(["fp8", "inspect", model, *data, "--recipe", "current", "--heatmap", str(tmp_path / "map.png"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["operands"]) == 3 * 7 * 3
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert main(["fp8", "inspect", model, *data, "--lora.rank", "4", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["operands"]
    assert {one["gemm"] for one in seen} == {"fprop", "dgrad"}  # the frozen base has no wgrad
    assert main(["fp8", "bisect", model, *data, "--recipe", "delayed"]) == 0
    assert "nothing stands out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["fp8", "frob"], 2, "fp8 frob: there are plan, inspect, bisect, probe"),
        (["fp8", "plan"], 2, "model"),
        (["fp8", "plan", "MODEL", "--fp8.keep", "*.nope"], 78, "fp8.keep: '*.nope' matches no layer"),
        (["fp8", "plan", "MODEL", "--recipe", "fast"], 78, "fp8.recipe"),
        (["fp8", "probe", "--model", "MODEL", "--data", "x", "--recipes", "block,none"], 2, "given 'none'"),
        (["fp8", "inspect", "MODEL"], 78, "data.train"),
        (
            ["fp8", "plan", "MODEL", "--fp8.keep", "*.q_proj:grad"],
            78,
            "after the colon expected fprop, dgrad, wgrad, found 'grad'",
        ),
        (["fp8", "plan", "MODEL", "--fp8.keep", "*.q_proj:"], 78, "after the colon expected fprop, dgrad, wgrad, found ''"),
        (["fp8", "plan", "MODEL", "--fp8.keep_first", "9"], 78, "no layer of LlamaForCausalLM can run in FP8"),
        (["fp8", "plan", "MODEL", "--recipe", "none"], 2, "--recipe none: without FP8 there is nothing to look at"),
        (["fp8", "plan", "MODEL", "--fp8.recipe", "none"], 2, "--recipe none: without FP8 there is nothing to look at"),
        (["fp8", "inspect", "MODEL", "--data", "ROWS", "--heatmap", "."], 73, "--heatmap .: expected a file"),
        (
            ["fp8", "probe", "--model", "MODEL", "--data", "ROWS", "--fp8.margin", "1"],
            78,
            "margin has no meaning with recipe block",
        ),
        (
            ["fp8", "inspect", "MODEL", "--data", "ROWS", "--heatmap", "no/where.png"],
            73,
            "--heatmap no/where.png: expected a file",
        ),
        (["fp8", "inspect", "MODEL", "--data", "ROWS", "--fp8.backend", "te"], 78, "look into the layers of backend reference"),
        (
            ["fp8", "probe", "--model", "MODEL", "--data", "ROWS", "--precision", "fp64"],
            78,
            "must be `none` with precision `fp64`",
        ),
        (["fp8", "probe", "--model", "MODEL", "--data", "ROWS", "--fp8.keep", "*.nope"], 78, "matches no layer"),
        (["fp8", "probe", "--model", "MODEL", "--data", "ONE"], 65, "one row to train on and none to look at"),
        (["fp8", "inspect", "CORRUPT", "--data", "ROWS"], 65, "corrupt/model.safetensors: corrupt, or cut short"),
    ],
)
def test_mistakes(words, code, said, subject_files, tmp_path, capsys):
    model, rows = subject_files / "model", subject_files / "rows.jsonl"
    one, corrupt = tmp_path / "one.jsonl", tmp_path / "corrupt"
    one.write_text(rows.read_text().splitlines(keepends=True)[0])
    shutil.copytree(model, corrupt)
    (corrupt / "model.safetensors").write_bytes(b"no tensors at all")
    places = {"MODEL": model, "ROWS": rows, "ONE": one, "CORRUPT": corrupt}
    assert main([str(places.get(word, word)) for word in words]) == code
    assert said in capsys.readouterr().err
