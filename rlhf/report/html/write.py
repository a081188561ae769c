"""RUN/report.html: one file that needs no other, in one step."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.errors import OutputError, without_secrets
from rlhf.report.html.gather import RunPage, find_runs, gather
from rlhf.report.html.verdict import worst

TEMPLATE = "page.html.j2"
MARK, MARKED_WITHIN = b'content="rlhf report"', 10_000
"""In the head of each page: what lacks it is a file of somebody else's."""
WORDS = {"good": "Nothing looks wrong", "warn": "Look at the warnings", "bad": "Something is wrong"}


def write_report(place: Path, output: Path | None = None) -> tuple[Path, list[RunPage]]:
    """Raises:
    DataError: there is no run.
    OutputError: the page cannot be written, or would take the place of a file that is no report.
    """
    target = output or place
    target = target / "report.html" if target.is_dir() else target
    if target.is_file() and not _is_report(target):
        raise OutputError(f"{target}: is there already and is no report; name another file with --output")
    pages = [gather(run) for run in find_runs(place)]
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        # half of a surrogate pair, as a tokenizer may leave at the end of a reply, is shown as its escape
        partial.write_text(without_secrets(render(place, pages)), encoding="utf-8", errors="backslashreplace")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{target}: cannot be written: {error.strerror}; name another with --output") from error
    return target, pages


def _is_report(file: Path) -> bool:
    with file.open("rb") as opened:
        return MARK in opened.read(MARKED_WITHIN)


def render(place: Path, pages: list[RunPage]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # replies, prompts and paths are text of anybody
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    level = worst([finding for page in pages for finding in page.findings])
    return environment.get_template(TEMPLATE).render(place=place, pages=pages, level=level, words=WORDS)
