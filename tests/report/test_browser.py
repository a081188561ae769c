"""The page in a real browser: nothing on its console, nothing wider than a laptop's or a phone's screen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf.report.html.write import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000")  # fmt: skip

MEASURE = """<script>
for (const closed of document.querySelectorAll("details")) closed.open = true;
const found = {wide: document.documentElement.scrollWidth, window: window.innerWidth,
               pictures: document.querySelectorAll("svg").length};
parent.postMessage(JSON.stringify(found), "*");
</script>"""

FRAME = """<!doctype html><body><iframe src="measured.html" width="{width}" height="900" style="border:0"></iframe><script>
onmessage = event => document.body.innerHTML = "<pre id=found>" + event.data + "</pre>";
</script></body>"""
"""A window is 500 pixels wide at least; a frame is as wide as one says."""


def opened(page: Path, width: int, profile: Path) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, width: int, profile: Path) -> dict[str, int]:
    """Of a copy that may run the script which measures it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.with_name("measured.html").write_text(text.replace("</body>", MEASURE + "</body>"))
    page.with_name("frame.html").write_text(FRAME.format(width=width))
    done = opened(page.with_name("frame.html"), 1400, profile)
    return json.loads(html.unescape(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0]))


@pytest.fixture
def page(runs: Path, tmp_path: Path) -> Path:
    """With what makes a page wide: long words in a reply and in a path."""
    place = Path(shutil.copytree(runs, tmp_path / ("runs" * 20)))
    with (place / "ppo" / "samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 9, "prompt": "p" * 500, "response": "<script>throw 1</script>" * 40, "scores": {}}) + "\n"
        )
    return write_report(place)[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_screen(page, width, tmp_path):
    found = measured(page, width, tmp_path / "profile")
    assert found["window"] == width
    assert found["wide"] <= width
    assert found["pictures"] > 10


def test_the_console_is_silent(page, tmp_path):
    done = opened(page, 1280, tmp_path / "profile")
    assert "rlhf report" in done.stdout
    assert console(done) == []


def test_what_is_too_wide_or_complains_would_be_seen(page, tmp_path):
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</main>", '<div style="width:2000px">x</div><script>1</script></main>'))
    assert measured(broken, 390, tmp_path / "profile")["wide"] >= 2000
    assert console(opened(broken, 390, tmp_path / "other")) != []  # the page's own policy refuses the script
