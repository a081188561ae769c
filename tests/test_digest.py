"""Digests against the standard's own example, and the cache against every way a file can change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from rlhf import digest

# FIPS 180-4's example message.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file large enough to be remembered, whose digest is known."""
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(digest.REMEMBER_FROM_BYTES))
    return file


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read; every file counts as settled."""
    read: list[Path] = []
    hash_file = digest._hash
    monkeypatch.setattr(digest, "_hash", lambda path: read.append(path) or hash_file(path))
    monkeypatch.setattr(digest, "SETTLED_NS", -1)
    return read


def test_known_digest(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest.text_digest("abc") == digest.file_digest(tmp_path / "abc") == ABC


def test_an_unchanged_large_file_is_read_once(large: Path, hashed: list[Path]) -> None:
    assert digest.file_digest(large) == digest.file_digest(large)
    assert hashed == [large]


def test_a_small_file_is_always_read(tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "small").write_text("x")
    digest.file_digest(tmp_path / "small")
    digest.file_digest(tmp_path / "small")
    assert len(hashed) == 2


def test_a_file_written_just_now_is_not_remembered(large: Path, cache: Path) -> None:
    digest.file_digest(large)
    assert not (cache / "digests.json").exists()


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[12345] ^= 1
    file.write_bytes(content)


def flip_a_byte_and_hide_it(file: Path) -> None:
    stat = file.stat()
    flip_a_byte(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_another_file(file: Path) -> None:
    stat, other = file.stat(), file.with_name("other")
    other.write_bytes(b"\1" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("change", [flip_a_byte, flip_a_byte_and_hide_it, replace_by_another_file, lengthen])
def test_a_changed_file_is_read_again(large: Path, hashed: list[Path], change) -> None:
    before = digest.file_digest(large)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    change(large)
    assert digest.file_digest(large) != before


@pytest.mark.parametrize("content", ["", "{", "[1"])
def test_a_broken_cache_is_an_empty_one(large: Path, hashed: list[Path], cache: Path, content: str) -> None:
    expected = digest.file_digest(large)
    (cache / "digests.json").write_text(content)
    assert digest.file_digest(large) == expected
    assert len(hashed) == 2


def test_a_cache_that_cannot_be_written_is_no_error(large: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(large / "below_a_file"))
    assert digest.file_digest(large) == digest.file_digest(large)
    assert len(hashed) == 2


def test_the_cache_keeps_the_newest(large: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "REMEMBERED_FILES", 1)
    other = large.with_name("other")
    other.write_bytes(large.read_bytes())
    for file in (large, other, other, large):
        digest.file_digest(file)
    assert hashed == [large, other, large]


# From `head --bytes 1048576 /dev/zero | sha256sum`.
ZEROS = "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58"


def test_what_is_begun_is_hashed_once(large: Path, hashed: list[Path]) -> None:
    digest.begin([large])
    assert digest.file_digest(large) == ZEROS
    digest.begin([large])  # remembered by now
    assert str(large) not in digest._begun
    assert digest.file_digest(large) == ZEROS
    assert not hashed


@pytest.mark.parametrize("change", [flip_a_byte, flip_a_byte_and_hide_it, replace_by_another_file, lengthen])
def test_what_changes_after_it_was_begun_is_hashed_again(large: Path, hashed: list[Path], change) -> None:
    time.sleep(0.02)  # longer than a tick of the file system's clock
    digest.begin([large])
    assert digest._begun[str(large)][1].result() == ZEROS
    change(large)
    assert digest.file_digest(large) == hashlib.sha256(large.read_bytes()).hexdigest() != ZEROS


def test_a_file_that_cannot_be_read_is_told_to_who_asks(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(digest, "_hash_mapped", unreadable)
    digest.begin([large])
    with pytest.raises(PermissionError):
        digest.file_digest(large)


def tree(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        file = directory / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


def test_a_tree_is_its_names_and_contents(tmp_path: Path) -> None:
    original = digest.tree_digest(tree(tmp_path / "1", a="x", sub__b="y"))
    assert digest.tree_digest(tree(tmp_path / "2", sub__b="y", a="x")) == original
    assert digest.tree_digest(tree(tmp_path / "3", a="x", sub__c="y")) != original
    assert digest.tree_digest(tree(tmp_path / "4", a="y", sub__b="x")) != original
    assert digest.tree_digest(tree(tmp_path / "5", a="x", b="y")) != original
    assert digest.file_digests(tmp_path / "1") == {"a": digest.text_digest("x"), "sub/b": digest.text_digest("y")}


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    original = digest.tree_digest(tree(tmp_path, a="x"))
    (tmp_path / ".lock").write_text("held")
    tree(tmp_path / ".cache", b="y")
    assert digest.tree_digest(tmp_path) == original
