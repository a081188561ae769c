"""`rlhf data`: planted dirt is found at its place, clean data pass in silence, and what is written is what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.data.survey import percentiles, unmangled, without_html

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


CLEAN = [pair(f"q{row}", "a good one" if row % 2 else "good", "bad" if row % 2 else "a bad one") for row in range(6)]


def check(file: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["data", "check", str(file), *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_clean_data_are_called_so(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", *CLEAN)
    code, found = check(file, capsys)
    assert (code, found["kind"], found["rows"], found["findings"], found["errors"]) == (0, "ranking", 6, [], [])
    assert main(["data", "check", str(file)]) == 0
    assert "no error, nothing odd" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("html", pair("q", "see <br/> this", "bad")),
        ("html", pair("q", "a &amp; b", "bad")),
        ("encoding", pair("q", "cafÃ©", "bad")),
        ("encoding", pair("q", "it\u00e2\u20ac\u2122s", "bad")),
        ("encoding", pair("q", "caf\ufffd", "bad")),
        ("control", pair("q", "be\u0007ll", "bad")),
        ("duplicates", CLEAN[2]),
        ("contradictions", pair("q1", "bad", "a good one")),
        ("equal", pair("q", "same", "same")),
    ],
)
def test_planted_dirt_is_found_at_its_place(name, row, tmp_path, capsys):
    code, found = check(write(tmp_path / "pairs.jsonl", *CLEAN, row), capsys)
    assert code == 0
    assert [(one["name"], one["rows"]) for one in found["findings"] if one["name"] != "length"] == [(name, 1)]
    assert name == "equal" or "pairs.jsonl:7" in found["findings"][0]["text"]


@pytest.mark.parametrize("text", ["1 < 2 and 3 > 2", "x<y>z", "Ça va, São Tomé, naïve café", "A&B", "tab\tand\nline"])
def test_what_only_looks_like_dirt_is_let_pass(text, tmp_path, capsys):
    assert check(write(tmp_path / "pairs.jsonl", *CLEAN, pair("q", text, "b" * 80)), capsys)[1]["findings"] == []


def test_a_taste_for_length_is_told(tmp_path, capsys):
    _, found = check(write(tmp_path / "pairs.jsonl", *(pair(f"q{row}", "a long one", "short") for row in range(4))), capsys)
    assert [one["name"] for one in found["findings"]] == ["length"]


def test_mistakes_have_their_places_and_their_code(tmp_path, capsys):
    code, found = check(write(tmp_path / "pairs.jsonl", CLEAN[0], "{", {"prompt": "q", "chosen": "c"}), capsys)
    assert code == 65
    assert [error["where"].rpartition("/")[2] for error in found["errors"]] == ["pairs.jsonl:2:2", "pairs.jsonl:3"]


def test_a_prompt_of_the_other_file_is_leakage(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", *CLEAN)
    held_out = write(tmp_path / "eval.jsonl", {"prompt": "q3"}, {"prompt": "new"})
    _, found = check(train, capsys, "--against", str(held_out))
    assert [(one["name"], one["rows"]) for one in found["findings"]] == [("leakage", 1)]
    assert "train.jsonl:4" in found["findings"][0]["text"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "sft"),
        ({"instruction": "do", "input": "this", "output": "done"}, "sft"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sft"),
        ({"prompt": "q", "choosen": "a", "rejected": "b"}, "ranking"),
        ({"prompt": "q", "completion": "a", "label": True}, "rated"),
        ({"prompt": "q"}, "prompt"),
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, "ranking"),
    ],
)  # fmt: skip
def test_the_kind_is_found_out(row, kind, tmp_path, capsys):
    code, found = check(write(tmp_path / "rows.jsonl", row), capsys)
    assert (code, found["kind"]) == (0, kind)


def test_alpaca_is_read_as_llama_factory_joins_it(tmp_path):
    from rlhf.data.rows import read_rows

    file = write(
        tmp_path / "rows.jsonl",
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
        {"instruction": "Say yes.", "input": "", "output": "yes"},
    )
    assert [row.fields for row in read_rows(file, "sft").rows] == [
        {"prompt": "Translate.\nchat", "completion": "cat"},
        {"prompt": "Say yes.", "completion": "yes"},
    ]


def test_alpaca_keeps_its_output_where_that_is_named_or_asked_for(tmp_path):
    from rlhf.data.rows import read_rows

    file = write(tmp_path / "rows.jsonl", {"instruction": "Translate.", "input": "", "output": "cat"})
    [named] = read_rows(file, "sft", columns={"completion": "output"}).rows
    assert named.fields == {"prompt": "Translate.", "completion": "cat"}
    [asked] = read_rows(file, "prompt", asked={"output": "a verifier"}).rows
    assert (asked.fields["prompt"], asked.others["output"]) == ("Translate.", "cat")


def test_a_misnamed_column_is_told_once_with_its_flag(tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", *({"question": f"q{row}", "chosen": "a", "rejected": "b"} for row in range(30)))
    assert main(["data", "split", str(file), str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--stage", "rm"]) == 65
    assert "? --columns.prompt question" in capsys.readouterr().err
    from rlhf.data.rows import read_rows
    from rlhf.errors import DataError

    with pytest.raises(DataError) as told:
        read_rows(file, "pair")
    assert len(str(told.value).splitlines()) == 2


def test_percentiles_by_hand():
    assert percentiles(range(1, 101)) == [1, 50, 90, 99, 100]
    assert percentiles([7]) == [7] * 5


@pytest.mark.parametrize("text", ["café", "it’s", "“so”", "naïve – Ünïcödé", "😀 ok"])
def test_mojibake_is_undone(text):
    """As browsers read Windows-1252: its five missing letters are the bytes themselves."""
    missing = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
    broken = "".join(chr(byte) if byte in missing else bytes([byte]).decode("cp1252") for byte in text.encode())
    assert broken != text
    assert unmangled(broken) == text


@pytest.mark.parametrize("text", ["café", "„Spaß“", "CAFÉ…", "cliché…”", "São Tomé", "ações", "日本", "über–", "à « la »"])
def test_good_letters_are_left(text):
    assert unmangled(text) == text


@pytest.mark.parametrize("text", ["a?id=1&section=2", "a?x=1&copy=2", "AT&T", "1 < 2"])
def test_what_resembles_an_entity_is_left(text):
    assert without_html(text) == text


def test_two_sides_in_one_file_and_a_report_that_is_there_are_refused(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", *CLEAN)
    assert main(["data", "split", str(file), str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl")]) == 2
    assert "is given twice" in capsys.readouterr().err
    (tmp_path / "out.jsonl.report.json").write_text("mine")
    assert main(["data", "clean", str(file), str(tmp_path / "out.jsonl")]) == 73
    assert (tmp_path / "out.jsonl.report.json").read_text() == "mine"


def test_a_date_of_parquet_is_written(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    day = datetime.datetime(2024, 5, 6, 7)
    rows = [{"prompt": f"q{row}", "completion": "a", "at": day} for row in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert main(["data", "clean", str(tmp_path / "in.parquet"), str(tmp_path / "out.jsonl")]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["at"] == "2024-05-06T07:00:00"


def test_each_stage_may_be_said(tmp_path, capsys):
    assert main(["data", "check", str(write(tmp_path / "in.jsonl", *CLEAN)), "--stage", "dpo"]) == 0
    assert "6 rows for dpo" in capsys.readouterr().out


def test_html_is_taken_out_and_comparisons_left():
    assert without_html("<p>one</p>two<br>three &lt;x&gt; <b class='y'>bold</b>") == "one\ntwo\nthree <x> bold"
    assert without_html("1 < 2, a<T>b") == "1 < 2, a<T>b"


def test_clean_writes_a_new_file_and_says_what_it_did(tmp_path, capsys):
    file = write(tmp_path / "in.jsonl", *CLEAN, "{", CLEAN[0], pair("q", "cafÃ© <br> x", "b"), pair("q9", "same", "same"))
    before = file.read_bytes()
    output = tmp_path / "out.jsonl"
    assert main(["data", "clean", str(file), str(output)]) == 0
    assert file.read_bytes() == before
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert rows == [*CLEAN, pair("q", "café \n x", "b")]
    report = json.loads(Path(f"{output}.report.json").read_text())
    assert (report["read"], report["written"]) == (10, 7)
    changes = {
        what.split(":")[-1].strip(): [place.rpartition(":")[2] for place in at] for what, at in report["changes"].items()
    }
    assert changes["the same as a row before"] == ["8"]
    assert changes["chosen equals rejected"] == ["10"]
    assert changes["encoding mended"] == changes["HTML taken out"] == ["9"]
    capsys.readouterr()
    assert main(["data", "clean", str(file), str(output)]) == 73  # never over a file


def test_a_split_holds_its_promises(tmp_path):
    rows = [{"prompt": f"q{row % 150}", "completion": f"a{row}"} for row in range(300)]
    sides = {}
    for name, some in (("all", rows), ("grown", [{"prompt": "new", "completion": "x"}, *reversed(rows)])):
        train, held_out = tmp_path / f"{name}.train.jsonl", tmp_path / f"{name}.eval.jsonl"
        assert main(["data", "split", str(write(tmp_path / f"{name}.jsonl", *some)), str(train), str(held_out)]) == 0
        sides[name] = [{json.dumps(json.loads(line)) for line in side.read_text().splitlines()} for side in (train, held_out)]
    train, held_out = sides["all"]
    assert train | held_out == {json.dumps(row) for row in rows}
    assert not train & held_out
    asked = [{json.loads(row)["prompt"] for row in side} for side in (train, held_out)]
    assert not asked[0] & asked[1]
    assert 5 <= len(asked[1]) <= 27  # of 150 prompts a tenth, within three deviations and a half
    assert held_out <= sides["grown"][1]
    assert train <= sides["grown"][0]


def test_a_pair_without_a_difference_is_in_neither_side_and_counted(tmp_path, capsys):
    rows = [*(pair(f"q{row}", "good", "bad") for row in range(20)), pair("q", "same", "same")]
    sides = [tmp_path / "train.jsonl", tmp_path / "eval.jsonl"]
    words = ["data", "split", str(write(tmp_path / "in.jsonl", *rows)), *map(str, sides), "--part", "0.5", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["neither, as chosen equals rejected"] == 1
    assert sum(len(side.read_text().splitlines()) for side in sides) == 20


@pytest.fixture
def model(tmp_path):
    from rlhf.training.tiny import write_tiny_model

    write_tiny_model(tmp_path, seed=0)
    return tmp_path / "model"


def test_preview_shows_what_is_trained_and_where_it_ends(model, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", {"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "d"})
    assert main(["data", "preview", str(file), "--model", str(model), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:1  row: " in shown
    assert "of them trained on" in shown
    assert "rows.jsonl:2" not in shown
    before, after = shown.split("⟦")  # no terminal, no colour
    assert ("c" in after.split("⟧")[0], "b" in before) == (True, True)


def test_one_bad_row_at_the_head_does_not_make_pairs_prompts(tmp_path, capsys):
    code, found = check(write(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "c"}, *CLEAN), capsys)
    assert (code, found["kind"], len(found["errors"])) == (65, "ranking", 1)


def test_mistakes_that_are_the_same_are_told_once_and_all_counted(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", *CLEAN, *[pair("q", "", "b")] * 9)
    assert main(["data", "check", str(file)]) == 65
    said = capsys.readouterr().out
    assert said.count("chosen is empty") == 1
    assert "in 8 rows more the same" in said
    assert len(check(file, capsys)[1]["errors"]) == 9


def test_the_other_file_is_read_with_its_own_columns(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", {"question": "q3", "answer": "a"}, {"question": "new", "answer": "a"})
    words = ["--columns.prompt", "question", "--columns.completion", "answer", "--against"]
    _, found = check(train, capsys, *words, str(write(tmp_path / "eval.jsonl", *CLEAN)))
    assert [(one["name"], one["rows"]) for one in found["findings"]] == [("leakage", 1)]


def test_rows_of_no_kind_are_told_with_their_columns(tmp_path, capsys):
    assert main(["data", "check", str(write(tmp_path / "odd.jsonl", {"question": "q", "answer": "a"}))]) == 65
    said = capsys.readouterr().err
    assert "they have question, answer" in said
    assert "--columns.prompt NAME" in said


@pytest.mark.parametrize(("prompt", "code"), [("<|pad|><|pad|>a", 65), ("<|pad|>a", 0)])
def test_two_bos_are_an_error_of_preview(prompt, code, model, tmp_path, capsys):
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|pad|>"}))
    file = write(tmp_path / "rows.jsonl", {"prompt": prompt, "completion": "c"})
    assert main(["data", "preview", str(file), "--model", str(model)]) == code
    assert ("two BOS" in capsys.readouterr().out) == (code == 65)


def test_in_tokens_the_cut_and_the_equal_are_counted(model, tmp_path, capsys):
    long = "a b c d " * 8
    file = write(tmp_path / "rows.jsonl", *CLEAN[:0], pair("a", long + "a", long + "b"), pair("a", "b", "c"))
    code, found = check(file, capsys, "--model", str(model), "--max-length", "12", "--too-long", "truncate")
    assert code == 0
    assert any("1 pairs dropped: chosen and rejected are the same tokens" in note for note in found["tokens"])
    _, found = check(file, capsys, "--model", str(model), "--max-length", "400")
    assert not any("dropped" in note for note in found["tokens"])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["check", "nowhere.jsonl"], 65),
        (["check"], 2),
        (["preview", "nowhere.jsonl"], 2),
        (["split", "nowhere.jsonl", "one.jsonl"], 2),
        (["clean", "nowhere.jsonl", "out.txt"], 2),
        (["split", "nowhere.jsonl", "a.jsonl", "b.jsonl", "--part", "2"], 2),
        (["check", "nowhere.jsonl", "--json-key", "text", "--stage", "ppo"], 2),
    ],
)
def test_mistakes_are_one_message(words, code, capsys):
    assert main(["data", *words]) == code
    assert capsys.readouterr().err.startswith("rlhf: error: ")


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("name", "words", "kind", "rows"),
    [
        ("pref_hh_helpful-base", [], "ranking", 2352),
        ("hh_helpful-base.test", [], "ranking", 2354),
        ("pref_llamafactory_dpo_en_demo", [], "ranking", 300),
        ("sft_oasst_en100_trees", [], "sft", 254),
        ("sft_gsm8k_train", ["--columns.prompt", "question", "--columns.completion", "answer"], "sft", 7473),
        ("prompts_user_oriented_252", [], "prompt", 252),
        ("sent_sst2_train", [], "sft", 6920),
    ],
)
def test_real_sets(name, words, kind, rows, capsys):
    """Rows as counted by the sets' own README; hh-rlhf prefers the longer reply in 59%."""
    code, found = check(REAL / f"{name}.jsonl.gz", capsys, *words)
    assert (found["kind"], found["rows"]) == (kind, rows)
    assert code == (65 if "hh_helpful" in name else 0)  # four empty replies
    if "hh" in name:
        (length,) = [one for one in found["findings"] if one["name"] == "length"]
        assert length["rows"] / rows == pytest.approx(0.59, abs=0.01)
