"""`rlhf compare`, of recordings: equal where nothing differs, and where something does, the module that it was planted in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf.cli import main
from rlhf.models.recordings import VALUES, Recording, compare_recordings, recorded, write_recording


def record(model, file, *words: object) -> None:
    assert main(["compare", str(model), "--record", str(file), *map(str, words)]) == 0


def compare(one, other, *words: object, capsys) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["compare", str(one), str(other), *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def recordings(llamas, tmp_path_factory):
    """The model once more than once, in two precisions, and with one weight of layer 1's MLP moved by a thousandth."""
    places = tmp_path_factory.mktemp("recordings")
    for name, words in (("a", ()), ("b", ()), ("bf16", ("--precision", "bf16")), ("fp8", ("--precision=fp8",))):
        record(llamas / "model", places / f"{name}.safetensors", *words)
    shutil.copytree(llamas / "model", places / "touched")
    tensors = load_file(places / "touched" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, places / "touched" / "model.safetensors", metadata={"format": "pt"})
    record(places / "touched", places / "touched.safetensors")
    return places


def test_the_same_twice_is_equal_to_the_bit(recordings, capsys):
    code, found = compare(recordings / "a.safetensors", recordings / "b.safetensors", capsys=capsys)
    assert (code, found["equal"], found["first"], found["made_of"]) == (0, True, None, [])
    assert {output["relative"] for output in found["outputs"]} == {0.0}


def test_a_planted_change_is_the_first_that_differs(recordings, capsys):
    """Row 3 of the matrix is channel 3 of its output; what comes before it, the gate too, is equal to the bit."""
    code, found = compare(recordings / "a.safetensors", recordings / "touched.safetensors", capsys=capsys)
    assert (code, found["first"]["name"]) == (1, "model.layers.1.mlp.up_proj")
    assert found["first"]["place"][-1] == 3
    assert found["first"]["largest"] == pytest.approx(abs(found["first"]["one"] - found["first"]["other"]))
    names = [output["name"] for output in found["outputs"]]
    before = found["outputs"][: names.index("model.layers.1.mlp.up_proj")]
    assert "model.layers.1.mlp.gate_proj" in [output["name"] for output in before]
    assert {output["relative"] for output in before} == {0.0}
    assert all(output["relative"] > 0 for output in found["outputs"][names.index("model.layers.1.mlp.up_proj") :])
    words = [recordings / "a.safetensors", recordings / "touched.safetensors", "--tolerance", 0.5]
    assert compare(*words, capsys=capsys)[0] == 0


def test_rounding_grows_from_fp32_to_bf16_to_fp8(recordings, capsys):
    """bfloat16 has 8 bits of mantissa, E4M3 four: a product of rounded numbers is off by about 2^-8 and 2^-4."""
    errors = {}
    for name in ("bf16", "fp8"):
        code, found = compare(recordings / "a.safetensors", recordings / f"{name}.safetensors", capsys=capsys)
        assert (code, found["first"]["name"]) == (1, "model.layers.0.self_attn.q_proj")
        assert [part["name"] for part in found["made_of"]] == ["precision"]
        errors[name] = {output["name"]: output["relative"] for output in found["outputs"]}
    assert 2**-10 < errors["bf16"]["model.layers.0.self_attn.q_proj"] < 2**-7
    assert 2**-6 < errors["fp8"]["model.layers.0.self_attn.q_proj"] < 2**-3
    for of in errors.values():
        assert of["lm_head"] > of["model.layers.0.self_attn.q_proj"]
        assert of["model.layers.1"] > of["model.layers.0"]


def test_what_is_kept_is_what_transformers_computes(recordings, llamas):
    """Two rows as one sequence here, one by one there."""
    model = AutoModelForCausalLM.from_pretrained(llamas / "model", dtype=torch.float32)
    with safe_open(recordings / "a.safetensors", "pt") as file:
        told = json.loads(file.metadata()["rlhf_recording"])
        names = [output["name"] for output in told["outputs"]]
        kept = file.get_tensor(f"output.{names.index('lm_head')}")
        ids, lengths = file.get_tensor("ids"), file.get_tensor("lengths").tolist()
    assert lengths == [32, 32]
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits[0] for row in ids.split(lengths)])
    assert torch.allclose(kept.view_as(logits), logits, atol=1e-5)
    assert told["about"]["precision"] == "fp32"
    assert told["about"]["versions.torch"] == torch.__version__


def test_rows_of_a_file_and_a_reward_model(llamas, tmp_path, capsys):
    for name, part in (("a", "critic"), ("b", "critic"), ("c", "model")):
        words = ["--data", llamas / "sft.jsonl", "--rows", 3, "--tokens", 5 if name != "c" else 6]
        record(llamas / part, tmp_path / f"{name}.safetensors", *words)
    code, found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors", capsys=capsys)
    assert code == 0
    assert found["outputs"][-1]["name"] == "score"
    assert main(["compare", str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors")]) == 65
    assert "other tokens" in capsys.readouterr().err


def test_other_columns_of_the_rows_and_too_many_tokens(llamas, tmp_path, capsys):
    """A file that was made for another stage; and more tokens than the model has positions."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a b", "completion": " c", "source": "x"}) + "\n")
    record(llamas / "model", tmp_path / "a.safetensors", "--data", rows, "--rows", 1)
    assert "positions" not in capsys.readouterr().err
    places = AutoModelForCausalLM.from_pretrained(llamas / "model").config.max_position_embeddings
    record(llamas / "model", tmp_path / "b.safetensors", "--tokens", places + 1, "--rows", 1)
    assert (
        f"the model has {places} positions: rows have at most so many tokens, not --tokens {places + 1}"
        in capsys.readouterr().err
    )
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_tensor("lengths").tolist() == [places]


class Twice(torch.nn.Module):
    """One module, called twice."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.part, self.gain = torch.nn.Identity(), gain

    def forward(self, x):
        return self.part(self.part(x) * self.gain)


def test_a_module_called_twice_by_hand(tmp_path):
    ids, lengths = torch.tensor([1]), torch.tensor([1])
    for name, gain in (("a", 2.0), ("b", 2.5)):
        model = Twice(gain)
        with recorded(model) as outputs:
            model(torch.tensor([[3.0, 4.0]]))
        assert [output.name for output in outputs] == ["part", "part#2"]
        assert outputs[0].norm == 5.0
        write_recording(tmp_path / f"{name}.safetensors", Recording({}, ids, lengths, outputs))
    found = compare_recordings(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.first is found.outputs[1]
    assert found.outputs[1].relative == pytest.approx(0.25)
    assert (found.outputs[1].place, found.outputs[1].one, found.outputs[1].other) == ([0, 1], 8.0, 10.0)


def test_of_a_large_output_some_of_every_column_is_kept_and_the_rest_is_in_its_norm(tmp_path):
    ids, lengths, whole = (
        torch.tensor([1]),
        torch.tensor([1]),
        torch.randn(3, VALUES, generator=torch.Generator().manual_seed(0)),
    )
    moved = whole.clone()
    moved[1, 7] += 1  # 65543, which three does not divide: between two that are kept
    files = []
    for name, tensor in (("a", whole), ("b", whole), ("c", moved)):
        model = torch.nn.Sequential(torch.nn.Identity())
        with recorded(model) as outputs:
            model(tensor)
        assert len(outputs[0].values) <= VALUES
        assert outputs[0].every == 3
        files.append(tmp_path / f"{name}.safetensors")
        write_recording(files[-1], Recording({}, ids, lengths, outputs))
    assert compare_recordings(files[0], files[1]).equal
    found = compare_recordings(files[0], files[2])
    assert found.first is not None
    assert found.first.what == "in values that were not kept"


def written(file: Path, tensor: torch.Tensor) -> Path:
    """The recording of one module that gives the tensor."""
    model = torch.nn.Sequential(torch.nn.Identity())
    with recorded(model) as outputs:
        model(tensor)
    write_recording(file, Recording({}, torch.tensor([1]), torch.tensor([1]), outputs))
    return file


@pytest.mark.parametrize(("factor", "within"), [(100.0, False), (1.0, True)])
def test_a_tolerance_is_of_what_was_not_kept_too(factor, within, tmp_path):
    """Every third is kept, of which one is off by 1e-4; the others are a hundred times as large, so the norm is 80 times."""
    whole = torch.randn(3, VALUES, generator=torch.Generator().manual_seed(0))
    moved = whole.clone()
    moved.flatten()[torch.arange(whole.numel()) % 3 != 0] *= factor
    moved[0, 0] += 1e-4
    found = compare_recordings(written(tmp_path / "a.safetensors", whole), written(tmp_path / "b.safetensors", moved), 1e-3)
    assert found.equal is within
    expected = moved.double().norm() / whole.double().norm() - 1 if factor > 1 else 1e-4 / whole.flatten()[::3].norm()
    assert found.outputs[0].relative == pytest.approx(float(expected), rel=1e-3)
    assert found.outputs[0].place == [0, 0]
    assert ("in values that were not kept" in found.outputs[0].what) is (factor > 1)


def test_a_change_too_small_for_the_norm_is_in_the_digest(tmp_path):
    """Neither kept nor, beside a million, in a norm of float64."""
    whole = torch.full((3, VALUES), 1e6)
    whole[1, 7] = 1e-6
    moved = whole.clone()
    moved[1, 7] = 2e-6
    found = compare_recordings(written(tmp_path / "a.safetensors", whole), written(tmp_path / "b.safetensors", moved))
    assert found.first is not None
    assert (found.first.what, found.first.relative) == ("in values that were not kept", 0.0)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 3], ids=["whole", "every third"])
def test_what_is_no_number_is_equal_to_itself(odd, rows, tmp_path):
    one = torch.ones(rows, VALUES)
    one[0, 0] = odd
    a, b = (written(tmp_path / f"{name}.safetensors", one) for name in "ab")
    assert compare_recordings(a, b).equal
    other = one.clone()
    other[0, 3] = 1.5  # one of those that are kept
    found = compare_recordings(a, written(tmp_path / "c.safetensors", other))
    assert found.first is not None
    assert (found.first.place, found.first.largest) == ([0, 3], 0.5)
    assert found.first.relative == pytest.approx(0.5 / (VALUES - 1) ** 0.5)
    found = compare_recordings(a, written(tmp_path / "d.safetensors", torch.ones(rows, VALUES)), 1e300)
    assert found.first is not None
    assert (found.first.relative, found.first.largest) == (torch.inf, torch.inf)
    assert found.as_json()["outputs"][0]["largest"] is None


def test_equal_to_the_bit_is_of_bits(tmp_path, capsys):
    """One and two are numbers of bfloat16, too; minus zero is equal to zero."""
    values = torch.tensor([1.0, 2.0, 0.0])
    a = written(tmp_path / "a.safetensors", values)
    typed = written(tmp_path / "typed.safetensors", values.bfloat16())
    signed = written(tmp_path / "signed.safetensors", torch.tensor([1.0, 2.0, -0.0]))
    for other, told in ((typed, "equal values, float32 and bfloat16"), (signed, "equal values of other bits")):
        assert main(["compare", str(a), str(other)]) == 1
        assert f"part at 0: {told}" in capsys.readouterr().out
        assert main(["compare", str(a), str(other), "--tolerance=1e-9"]) == 0
    assert main(["compare", str(a), str(written(tmp_path / "b.safetensors", values.clone()))]) == 0


def test_another_architecture_is_no_error(llamas, tmp_path, capsys):
    shutil.copytree(llamas / "model", tmp_path / "model")
    config = LlamaConfig.from_pretrained(llamas / "model")
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name, model in (("two", llamas / "model"), ("one", tmp_path / "model")):
        record(model, tmp_path / f"{name}.safetensors")
    code, found = compare(tmp_path / "two.safetensors", tmp_path / "one.safetensors", "--tolerance=1e9", capsys=capsys)
    assert (code, found["first"]["what"]) == (1, "only in the first")
    assert found["first"]["name"].startswith("model.layers.1.")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["a.safetensors", "touched"], 2, "touched is no recording"),
        (["a.safetensors", "touched/model.safetensors"], 65, "touched/model.safetensors: no recording"),
        (["a.safetensors", "b.safetensors", "--weights"], 2, "--weights: has no meaning"),
        (["touched", "touched", "--tolerance=1"], 2, "--tolerance: has no meaning"),
        (["a.safetensors", "b.safetensors", "--tolerance=nan"], 2, "--tolerance nan: expected a relative error"),
        (["a.safetensors", "b.safetensors", "--tolerance=-1"], 2, "--tolerance -1.0: expected a relative error"),
        (["a.safetensors", "b.safetensors", "--tolerance=inf"], 2, "--tolerance inf: expected a relative error"),
        (["touched", "touched", "--config=nowhere"], 2, "--config: is for a Megatron checkpoint"),
        (["touched", "--record", "/proc/new.safetensors"], 73, "/proc/new.safetensors: cannot be written"),
        (["touched", "--record", "a.safetensors"], 73, "a.safetensors: is there already"),
        (["touched", "--record", "new.bin"], 73, "must end in .safetensors"),
        (["touched", "--record", "no/new.safetensors"], 73, "there is no directory no"),
        (["touched", "--record", "new.safetensors", "--precision=fp16"], 78, "precision"),
        (["touched", "--record", "new.safetensors", "--device=cuda"], 78, "no GPU"),
    ],
)
def test_mistakes_are_one_message(words, code, told, recordings, monkeypatch, capsys):
    monkeypatch.chdir(recordings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compare", *words]) == code
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
