"""notes.jsonl: what a stage says, once each, through kills; its warnings are in the report."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from harness import before_each_step, flags, run

from rlhf.commands.report import run as report


def said(output: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["text"]) for line in map(json.loads, (output / "notes.jsonl").read_text().splitlines())]


def speak(die_at: int | None = None):
    """Something is said at each step; at one of them the process is killed."""

    def act(train) -> None:
        train.note(f"warning: this is step {train.step_done}")
        if train.step_done == die_at:
            signal.raise_signal(signal.SIGKILL)

    return before_each_step(act)


def test_what_is_said_is_kept_and_what_warns_is_in_the_report(world, tmp_path, capsys):
    """The rows of data.eval are among those of data.train, and few, which a stage warns of."""
    log, held_out = tmp_path / "log", tmp_path / "few.jsonl"
    held_out.write_text("".join((world / "sft.jsonl").read_text().splitlines(keepends=True)[:29]))
    assert run("sft", flags("sft", world, tmp_path / "run", data__eval=held_out), log) == 0
    notes = said(tmp_path / "run")
    assert len(notes) >= 4
    assert all(f"sft  {text}" in log.read_text() for _, text in notes)
    asked, few = [text for _, text in notes if text.startswith("warning: ")]
    assert report([str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert f"warn  {asked.removeprefix('warning: ')[:20]}" in told
    assert f"warn  F{few.removeprefix('warning: f')[:20]}" in told
    page = (tmp_path / "run" / "report.html").read_text()
    assert "trains " in page  # a note that warns of nothing
    assert "trains " not in told


def test_a_killed_run_says_nothing_twice_and_forgets_nothing(world, tmp_path):
    """Killed in its third step, with the line after that cut short, and again before it has a checkpoint."""
    log, output = tmp_path / "log", tmp_path / "run"
    arguments = flags("sft", world, output, checkpoint__every=2)
    assert run("sft", arguments, log, speak(die_at=1)) == -signal.SIGKILL
    assert run("sft", arguments, log, speak(die_at=3)) == -signal.SIGKILL
    with (output / "notes.jsonl").open("a") as file:
        file.write('{"step": 3, "text": "half a ')
    assert run("sft", arguments, log, speak()) == 0, log.read_text()
    whole = tmp_path / "whole"
    assert run("sft", flags("sft", world, whole, checkpoint__every=2), log, speak()) == 0
    found = said(output)
    assert [note for note in found if "warning" in note[1]] == [note for note in said(whole) if "warning" in note[1]]
    assert set(said(whole)) <= set(found)
    assert len(set(found)) == len(found)
    assert [step for step, text in found if text.startswith("goes on from")] == [2]


def test_a_finished_run_stays_as_it_is(world, tmp_path):
    log, output = tmp_path / "log", tmp_path / "run"
    arguments = flags("sft", world, output, schedule__length=1)
    assert run("sft", arguments, log) == 0
    before = (output / "notes.jsonl").read_bytes()
    assert run("sft", arguments, log) == 0
    assert (output / "notes.jsonl").read_bytes() == before


def test_a_secret_in_a_note_is_not_kept(world, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_TOKEN", "hf_this-is-one")
    log, output = tmp_path / "log", tmp_path / "run"
    change = before_each_step(lambda train: train.note("asked with hf_this-is-one"))
    assert run("sft", flags("sft", world, output, schedule__length=1), log, change) == 0
    assert (0, "asked with $HF_TOKEN") in said(output)
