"""SHA-256 digests of files, directories and texts: what lineage compares.

Digests of large files are remembered, so that a start does not read 7B parameters twice. A remembered digest is used
only while size, modification time, change time and inode are the same; whoever can forge those can forge the cache as
well, so this guards against accidents, not against an attacker with write access.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread

# Below this size reading the file costs no more than looking it up.
REMEMBER_FROM_BYTES = 1 << 20
# A file changed twice within one tick of the file system's clock looks unchanged: what is new is hashed again.
SETTLED_NS = 2 * 10**9
# The newest this many are kept: thousands of shards, and still a file of about a megabyte.
REMEMBERED_FILES = 4096
_begun: dict[str, tuple[list[int], Future[str]]] = {}


def cache_directory() -> Path:
    """Where this package keeps what it can make again: `$RLHF_CACHE`, or `~/.cache/rlhf`."""
    return Path(os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf")


def text_digest(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path | str) -> str:
    """SHA-256 of the file's bytes, as hex; read in pieces, and from the cache where the file has not changed."""
    path = Path(path).resolve()
    stat = path.stat()
    if stat.st_size < REMEMBER_FROM_BYTES:
        return _hash(path)
    identity = _identity(stat)
    known = _remembered().get(str(path))
    if known is not None and known["identity"] == identity:
        return known["digest"]
    when_begun, begun = _begun.pop(str(path), (None, None))
    digest = begun.result() if begun is not None and when_begun == identity else _hash(path)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
        _remember(str(path), {"identity": identity, "digest": digest})
    return digest


def begin(files: Iterable[Path]) -> None:
    """Hash large files from now on, on a thread of its own, for `file_digest` to pick up: an import uses one processor.

    Only for files that will be mapped anyway: who cuts one short meanwhile ends the process. The thread ends with the process,
    however far it is.
    """
    remembered, begun = _remembered(), []
    for file in files:
        path = file.resolve()
        stat = path.stat()
        known = remembered.get(str(path))
        if stat.st_size >= REMEMBER_FROM_BYTES and (known is None or known["identity"] != _identity(stat)):
            begun.append((path, Future()))
            _begun[str(path)] = _identity(stat), begun[-1][1]
    Thread(target=_keep_promises, args=(begun,), daemon=True).start()


def _keep_promises(begun: list[tuple[Path, Future[str]]]) -> None:
    for path, future in begun:
        try:
            future.set_result(_hash_mapped(path))
        except (OSError, ValueError) as error:  # for whoever asks for the digest
            future.set_exception(error)


def file_digests(directory: Path | str) -> dict[str, str]:
    """Digest of every file under the directory by relative name, sorted; hidden files and directories are left out."""
    directory = Path(directory)
    names = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return {
        name.as_posix(): file_digest(directory / name)
        for name in sorted(names)
        if not any(part.startswith(".") for part in name.parts)
    }


def tree_digest(directory: Path | str) -> str:
    """One digest of all names and contents under the directory; hidden files and directories are left out."""
    return text_digest(json.dumps(file_digests(directory)))


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_mapped(path: Path) -> str:
    """A third faster than reading, and one call, which never waits for its turn at the interpreter."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def _remembered() -> dict[str, dict]:
    try:
        found = json.loads((cache_directory() / "digests.json").read_text())
    except (OSError, ValueError):  # a cache that cannot be read is an empty one
        return {}
    return found if isinstance(found, dict) else {}


def _remember(path: str, entry: dict) -> None:
    entries = _remembered()
    entries.pop(path, None)  # so that it becomes the newest
    entries[path] = entry
    newest = dict(list(entries.items())[-REMEMBERED_FILES:])
    target = cache_directory() / "digests.json"
    partial = target.with_name(f".digests-{os.getpid()}")
    with suppress(OSError):  # a home that cannot be written costs time, not correctness
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(newest))
        partial.replace(target)
