"""Bad rows through whole stages: refused with their place, or left out within a limit; what is odd is counted and said.

The reader's own cases are in tests/data/test_malformed.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import flags, run, run_on_two

STAGES = ["sft", "rm", "ppo"]
GOOD = {
    "sft": {"prompt": "a b", "completion": " c d"},
    "rm": {"prompt": "a b", "chosen": " c d", "rejected": " e f"},
    "ppo": {"prompt": "a b"},
}
BAD = {
    b'{"prompt": 7}': "prompt is a number, expected a string or a list of messages",
    b'{"prompt": null}': "prompt is null, expected a string or a list of messages",
    b'{"prompt": NaN}': "NaN is not a JSON value",
    b'{"promt": "a"}': "unknown column 'promt' (did you mean 'prompt'?)",
    b'{"prompt": "a", "prompt": "b"}': "duplicate key 'prompt'",
    b'{"prompt": "\\ud83d"}': r"prompt holds the lone surrogate '\ud83d'",
    b'{"prompt": "\xff"}': "invalid UTF-8 byte 0xff",
    b'[{"prompt": "a"}]': "expected an object, found a list",
    b'{"prompt" "a"}': "not JSON: Expecting ':' delimiter",
    b'{"other": "a"}': "unknown column 'other'",
    b'{"prompt": "' + b"a " * 100 + b'"}': "the line is longer than 150 bytes",
    b'{"prompt": "a", "x': "truncated last line, it ends after 18 bytes",  # stays the last
}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_bad_rows(path: Path, stage: str) -> Path:
    """A byte-order mark, a blank line, good rows, and from line 20 on one bad row of every kind."""
    rows = [dict(GOOD[stage], prompt=f"a {letter}") for letter in "abcdefgh"]
    good = "".join(json.dumps(row) + "\n" for row in [*rows, *rows]).encode()
    replies = {"sft": b', "completion": " c"}', "rm": b', "chosen": " c", "rejected": " d"}', "ppo": b"}"}[stage]
    bad = [line[:-1] + replies if line.startswith(b'{"prompt":') and line.endswith(b"}") else line for line in BAD]
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n\n" + b"\n".join(bad))
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_bad_rows_are_refused_with_their_places(world: Path, tmp_path: Path, stage: str) -> None:
    data, log = with_bad_rows(tmp_path / "rows.jsonl", stage), tmp_path / "log"
    assert run(stage, flags(stage, world, tmp_path / "run", data=data, data__max_line_bytes=150), log) == 65
    said = log.read_text()
    for line, reason in enumerate(BAD.values(), start=20):
        assert any(f"{data}:{line}:" in one and reason in one for one in said.splitlines()), (line, reason, said)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)
    assert f"{data}:20: prompt is a number" in status["reason"]


@pytest.mark.parametrize("stage", STAGES)
def test_bad_rows_are_left_out_within_the_limit_and_counted(world: Path, tmp_path: Path, stage: str) -> None:
    data, log = with_bad_rows(tmp_path / "rows.jsonl", stage), tmp_path / "log"
    more = {"data": data, "data__max_line_bytes": 150, "data__on_error": "skip", "schedule__length": 1}
    assert run(stage, flags(stage, world, tmp_path / "no", data__max_skip_fraction=0.42, **more), log) == 65
    assert f"{data}: 12 of 28 rows are bad; data.max_skip_fraction is 0.42" in log.read_text()
    log.unlink()
    assert run(stage, flags(stage, world, tmp_path / "yes", data__max_skip_fraction=0.43, **more), log) == 0, log.read_text()
    said = log.read_text()
    assert "Bad rows were skipped: " in said
    assert "7 other reasons" in said
    assert "The file starts with a byte-order mark, which was skipped." in said
    assert "3 blank lines were skipped." in said
    assert "A prompt seen before is repeated in 8 rows." in said


LONG = "a b c d e f g h a b c d e f g h"


@pytest.mark.parametrize(("rule", "code", "message"), [
    ("fail", 65, "rows.jsonl:2: 1"),
    ("skip", 0, "warning: 1 of 2 rows longer than 8 tokens skipped"),
    ("truncate", 0, "warning: 1 of 2 rows longer than 8 tokens truncated"),
])  # fmt: skip
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_too_long_is_an_error_or_counted(
    world: Path, tmp_path: Path, stage: str, rule: str, code: int, message: str
) -> None:
    long = dict(GOOD[stage], prompt=LONG) if stage == "ppo" else GOOD[stage] | {key: LONG for key in ("completion", "chosen")}
    rows = {key: value for key, value in long.items() if key in GOOD[stage]}
    data, log = write(tmp_path / "rows.jsonl", GOOD[stage], rows), tmp_path / "log"
    more = {"data__max_length": 8, "data__too_long": rule, "data__eval": "null", "schedule__length": 1}
    assert run(stage, flags(stage, world, tmp_path / "run", data=data, **more), log) == code, log.read_text()
    assert message in log.read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_beyond_the_models_context_is_an_error(world: Path, tmp_path: Path, stage: str) -> None:
    long = {key: value if key == "rejected" else " ".join([LONG] * 4) for key, value in GOOD[stage].items()}
    data, log = write(tmp_path / "rows.jsonl", GOOD[stage], long), tmp_path / "log"
    assert run(stage, flags(stage, world, tmp_path / "run", data=data, data__eval="null"), log) == 65
    assert "positions, the model has 64: lower data.max_length" in log.read_text()


def test_pairs_without_a_difference_are_dropped_and_counted(world: Path, tmp_path: Path) -> None:
    same_at_first = {"prompt": "a", "chosen": f" {LONG} a", "rejected": f" {LONG} b"}
    equal = {"prompt": "a", "chosen": " b", "rejected": " b"}
    data, log = write(tmp_path / "rows.jsonl", GOOD["rm"], equal, equal, same_at_first), tmp_path / "log"
    more = {"data__max_length": 8, "data__too_long": "truncate", "data__eval": "null", "schedule__length": 1}
    assert run("rm", flags("rm", world, tmp_path / "run", data=data, **more), log) == 0, log.read_text()
    assert "The pair was dropped because chosen equals rejected in 2 rows." in log.read_text()
    assert "1 pairs dropped: chosen and rejected are the same tokens (after truncation)" in log.read_text()
    assert f"{data}: 1 prompts with ranked replies" in log.read_text()
    write(data, equal, same_at_first)
    assert run("rm", flags("rm", world, tmp_path / "none", data=data, **more), log) == 65
    assert f"{data}: no usable row is left" in log.read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_rows_that_are_trained_on_are_counted(world: Path, tmp_path: Path, stage: str) -> None:
    log = tmp_path / "log"
    train = write(tmp_path / "train.jsonl", GOOD[stage], dict(GOOD[stage], prompt="a c"), dict(GOOD[stage], prompt="c"))
    other, same = dict(GOOD[stage], prompt="h g"), GOOD[stage]
    for name, rows, expected in (("none", [other], ""), ("one", [same, other], "1 of the 2 rows")):
        data = write(tmp_path / f"{name}.jsonl", *rows)
        log.write_text("")
        more = {"data": train, "data__eval": data, "schedule__length": 1}
        assert run(stage, flags(stage, world, tmp_path / f"run-{name}", **more), log) == 0, log.read_text()
        assert ("ask what rows of" in log.read_text()) == bool(expected)
        if expected:
            assert f"warning: {expected} of {data} ask what rows of {train} ask" in log.read_text()


@pytest.mark.slow
def test_what_is_said_of_data_is_said_once_and_the_same_in_two_processes(world: Path, tmp_path: Path) -> None:
    data = with_bad_rows(tmp_path / "rows.jsonl", "sft")
    more = {"data": data, "data__eval": data, "data__max_line_bytes": 150, "data__on_error": "skip", "schedule__length": 1}
    arguments = {"data__max_skip_fraction": 0.5, **more}
    assert run("sft", flags("sft", world, tmp_path / "one", **arguments), tmp_path / "one.log") == 0
    assert run_on_two("sft", flags("sft", world, tmp_path / "two", **arguments), tmp_path / "two.log") == [0, 0]
    one, two = (
        [line for line in (tmp_path / name).read_text().splitlines() if "rows" in line] for name in ("one.log", "two.log")
    )
    assert one == two
    assert sum("warning: 16 of the 16 rows" in line for line in one) == 1
