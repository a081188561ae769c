"""What a terminal shows and what a log file gets; both are left as they were found, whatever ends the run."""

from __future__ import annotations

import io
import re
import sys
from contextlib import closing

import pytest
from rich.console import Console as RichConsole

from rlhf.report import console as module
from rlhf.report.console import ROWS, Console

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
PPO = {"reward/score": 1.25, "kl/sequence": 3.5, "policy/clip_fraction": 0.125, "value/explained_variance": 0.5,
       "rollout/length": 17.5, "optimizer/lr": 1e-05}  # fmt: skip


class Clock:
    """A second goes by with each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def on(terminal: bool, width: int = 100) -> tuple[RichConsole, io.StringIO]:
    text = io.StringIO()
    rich = RichConsole(
        file=text, force_terminal=terminal, width=width, height=40, color_system=None, soft_wrap=True, highlight=False
    )
    rich._environ = {"TERM": "xterm"}
    return rich, text


def last_screen(console: Console) -> list[str]:
    """The table and the bar as they stand, drawn apart from the terminal."""
    paper = RichConsole(file=io.StringIO(), width=console.rich.width, color_system=None)
    paper.print(console._drawn())
    return [line.rstrip() for line in paper.file.getvalue().splitlines() if line.strip()]  # pyright: ignore


def run(console: Console, clock: Clock, steps: int, of: int = 10) -> None:
    for step in range(1, steps + 1):
        console.step(step, step / of, 500.0, {"score": 1.25}, PPO | {"reward/score": step / 4})
        clock.now += 1


def test_the_table_has_the_last_steps_their_metrics_and_their_speed(monkeypatch):
    clock = Clock(monkeypatch)
    rich, text = on(terminal=True)
    console = Console("ppo", speak=True, rich=rich)
    run(console, clock, 8)
    *head, bar = last_screen(console)
    rows = head[3:]  # under names of two or three parts
    assert [row.split()[0] for row in rows] == [str(step) for step in range(9 - ROWS, 9)]
    assert rows[-1].split() == ["8", "2", "3.5", "0.125", "0.5", "17.5", "1e-05", "500"]
    assert head[0].split() == ["policy", "value"]
    assert head[1].split() == ["reward", "kl", "clip", "explained", "rollout", "optimizer"]
    assert head[2].split() == ["step", "score", "sequence", "fraction", "variance", "length", "lr", "tokens/s"]
    # seven steps in seven seconds after the first, a fifth of them to come
    assert re.fullmatch(r"ppo \S+ +80%  step 8  500 tokens/s  0:02 left", bar)
    console.close()
    assert "explained" in text.getvalue()
    assert text.getvalue().count(HIDE) == text.getvalue().count(SHOW) == 1
    assert text.getvalue().rindex(SHOW) > text.getvalue().rindex("lr")


@pytest.mark.parametrize(("width", "metrics"), [(20, 0), (40, 2), (80, 6), (120, 6)])
def test_no_line_is_wider_than_the_terminal(width, metrics, monkeypatch):
    """Else the terminal would break it, and the next redraw leave a part of it behind. The last metrics go first."""
    clock = Clock(monkeypatch)
    rich, text = on(terminal=True, width=width)
    console = Console("ppo", speak=True, rich=rich)
    run(console, clock, 3)
    console.live.refresh()  # pyright: ignore
    drawn = last_screen(console)
    console.close()
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    shown = [name for name in PPO if re.split("[/_]", name)[-1] in " ".join(drawn)]
    assert shown == list(PPO)[:metrics]


def test_a_log_file_gets_lines_and_no_table(monkeypatch):
    """Byte for byte: one every ten seconds, and the last."""
    clock = Clock(monkeypatch)
    rich, text = on(terminal=False)
    console = Console("ppo", speak=True, rich=rich)
    console.note("goes [on]")
    run(console, clock, 20, of=20)
    console.close()
    assert text.getvalue().splitlines() == [
        "ppo  goes [on]",
        "ppo    5%  step 1  score 1.25    ",
        "ppo   60%  step 12  score 1.25  500 tokens/s  0:08 left",
        "ppo  100%  step 20  score 1.25  500 tokens/s  0:00 left",
    ]
    assert "\x1b" not in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "text", ["found '\\[/INST]' here", "C:\\dir\\[/b]", r"x \[a^2\] y", "[bold]x[/bold] [/]", "a :smile: b"]
)
def test_a_note_is_printed_as_it_is(text, terminal):
    """It may quote a row, a reply or a path, in which rich would find markup, or an emoji."""
    rich, written = on(terminal)
    console = Console("ppo", speak=True, rich=rich)
    console.note(text)
    assert re.sub(r"\x1b\[[\d;]*m", "", written.getvalue()) == f"ppo  {text}\n"


def test_nor_is_the_name_of_a_metric_markup(monkeypatch):
    rich, _ = on(terminal=True)
    console = Console("ppo", speak=True, rich=rich)
    console.step(1, 0.5, 10.0, {"[b]x": 1.0})
    assert "[b]x" in "\n".join(last_screen(console))
    console.close()


def test_other_ranks_are_silent_on_a_terminal_too(monkeypatch):
    rich, text = on(terminal=True)
    console = Console("ppo", speak=False, rich=rich)
    console.note("here")
    run(console, Clock(monkeypatch), 3)
    console.close()
    assert text.getvalue() == ""


def test_a_note_stands_above_the_table(monkeypatch):
    clock = Clock(monkeypatch)
    rich, text = on(terminal=True)
    console = Console("ppo", speak=True, rich=rich)
    run(console, clock, 2)
    before = len(text.getvalue())
    console.note("warning: look")
    said = text.getvalue()[before:]
    console.close()
    assert said.index("warning: look") < said.index("explained")


def test_what_raises_leaves_the_terminal_as_it_was(monkeypatch):
    """open_training closes it so."""
    rich, text = on(terminal=True)
    console = Console("ppo", speak=True, rich=rich)
    streams = sys.stdout, sys.stderr

    def interrupted():
        with closing(console):
            run(console, Clock(monkeypatch), 2)
            assert SHOW not in text.getvalue()
            assert sys.stdout is not streams[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (sys.stdout, sys.stderr) == streams
    assert text.getvalue().rindex(SHOW) > text.getvalue().rindex(HIDE)
    console.close()  # twice is once
    assert text.getvalue().count(SHOW) == 1


def test_without_metrics_there_is_a_bar_alone(monkeypatch):
    """As `rlhf fp8 bisect` counts its looks."""
    rich, _ = on(terminal=True)
    console = Console("fp8 bisect", speak=True, rich=rich)
    console.step(3, 0.5, 0, {})
    assert len(last_screen(console)) == 1
    console.close()


def test_a_command_that_counts_rows_says_so_in_a_log_each_half_minute(monkeypatch):
    """124 rows, 4 at a time, 8 s and 40 tokens a batch: after 32 s four batches are done, 16 of the rows."""
    clock = Clock(monkeypatch)
    rich, text = on(terminal=False)
    for _ in Console("eval", speak=True, rich=rich).counted([range(4)] * 31, 124, "rows", lambda part: 10 * len(part)):
        clock.now += 8
    lines = text.getvalue().splitlines()
    assert lines[:2] == [
        "eval   13%  16 of 124 rows  5 tokens/s  3:36 left",
        "eval   26%  32 of 124 rows  5 tokens/s  3:04 left",
    ]
    assert len(lines) == 31 * 8 // 32


def test_what_is_counted_within_half_a_minute_is_not_told_to_a_log(monkeypatch):
    clock = Clock(monkeypatch)
    rich, text = on(terminal=False)
    for _ in Console("eval", speak=True, rich=rich).counted([range(4)] * 3, 12, "rows"):
        clock.now += 9
    assert text.getvalue() == ""


def test_a_terminal_gets_a_bar_of_the_rows_and_is_left_as_it_was(monkeypatch):
    clock = Clock(monkeypatch)
    rich, text = on(terminal=True)
    console, out = Console("eval", speak=True, rich=rich), sys.stdout
    for number, _ in enumerate(console.counted([range(4)] * 4, 16, "rows", lambda _: 100)):
        if number == 3:
            (bar,) = last_screen(console)
            assert re.fullmatch(r"eval \S+ +75%  12 of 16 rows  100 tokens/s  0:01 left", bar)
        clock.now += 1
    assert text.getvalue().count(HIDE) == text.getvalue().count(SHOW) == 1
    assert sys.stdout is out


def test_a_process_that_ends_at_once_shows_the_cursor_again(monkeypatch, capfd):
    """And waits for no lock that the thread which draws may hold."""
    rich, _ = on(terminal=True)
    console = Console("ppo", speak=True, rich=rich)
    console.abandon()
    assert capfd.readouterr().err == ""
    run(console, Clock(monkeypatch), 1)
    with console.live._lock:  # pyright: ignore
        console.abandon()
    assert SHOW in capfd.readouterr().err
    console.close()
