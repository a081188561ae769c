"""What a command writes: it is asked for before the work, and is never written over another file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf.errors import OutputError
from rlhf.training.output_file import require_new, write

LONGEST = 255
"""Bytes of a file's name (NAME_MAX of Linux and macOS)."""


def test_a_name_may_be_as_long_as_the_system_lets_it(tmp_path: Path) -> None:
    file = require_new(tmp_path / ("a" * (LONGEST - 6) + ".jsonl"))
    assert list(tmp_path.iterdir()) == []
    write(file, "é\n")
    assert [path.read_text("utf-8") for path in tmp_path.iterdir()] == ["é\n"]
    with pytest.raises(OutputError, match="cannot be made: File name too long"):
        require_new(tmp_path / ("a" * (LONGEST + 1)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_place_where_nothing_can_be_made_is_told_first() -> None:
    with pytest.raises(OutputError, match=r"/proc/x\.jsonl: cannot be made"):
        require_new("/proc/x.jsonl")


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    file = require_new(tmp_path / "a.jsonl")
    file.write_text("of another")
    with pytest.raises(OutputError, match="has been made by something else") as error:
        write(file, "ours")
    assert file.read_text() == "of another"
    (kept,) = set(tmp_path.iterdir()) - {file}
    assert (kept.read_text(), str(error.value).split()[-1]) == ("ours", str(kept))
    with pytest.raises(OutputError, match="is there already"):
        require_new(file)
    write(file, "ours, once more", over=True)
    assert file.read_text() == "ours, once more"


def test_a_link_to_nothing_is_there_too(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "a.jsonl")
    with pytest.raises(OutputError, match="is there already"):
        require_new(tmp_path / "a.jsonl")
