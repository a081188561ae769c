"""run.json and status.json: written whole or not at all, and true about the files they speak of."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.runs import manifest


def test_written_and_read(tmp_path: Path) -> None:
    value = {"text": "Zürich", "number": 1e-5, "none": None}
    manifest.write_json(tmp_path / "x.json", value)
    assert manifest.read_json(tmp_path / "x.json") == value
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    manifest.write_json(tmp_path / "x.json", "old")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full) if step == "fsync" else monkeypatch.setattr(manifest.json, "dump", full)
    with pytest.raises(OSError, match="disk full"):
        manifest.write_json(tmp_path / "x.json", "new")
    assert manifest.read_json(tmp_path / "x.json") == "old"


def test_no_number_that_is_none_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: not valid JSON"):
        manifest.read_json(tmp_path / "run.json")


def finished_run(run: Path) -> dict:
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "model" / "weights").write_bytes(b"1234")
    (run / "notes.txt").write_text("not an output")
    started = manifest.new_manifest("sft", {"seed": 3}, sys.argv, 3, 1, 1, {}, manifest.versions())
    manifest.finish(run, started, {"loss": 0.5})
    return manifest.read_json(run / "run.json")


def test_a_finished_run(tmp_path: Path) -> None:
    written = finished_run(tmp_path)
    assert written["result"] == {"loss": 0.5}
    assert written["files"]["model/weights"] == hashlib.sha256(b"1234").hexdigest()
    assert list(written["outputs"]) == ["model"]
    assert 0 <= manifest.seconds(written) < 60
    assert manifest.changed_files(tmp_path, written) == []
    status = manifest.read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["exit_code"], status["pid"]) == ("done", 0, os.getpid())


def test_every_change_is_named(tmp_path: Path) -> None:
    written = finished_run(tmp_path)
    (tmp_path / "model" / "weights").write_bytes(b"1235")
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "extra").write_text("")
    (tmp_path / "notes.txt").write_text("changed, and nobody's business")
    assert manifest.changed_files(tmp_path, written) == ["model/config.json", "model/extra", "model/weights"]
    assert manifest.changed_files(tmp_path, written, "model") == manifest.changed_files(tmp_path, written)


def test_versions_name_what_changes_bits() -> None:
    always = {"python", "rlhf", "torch", "transformers", "accelerate", "peft"}
    assert manifest.versions().keys() - {"deepspeed"} == always
