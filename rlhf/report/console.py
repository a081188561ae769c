"""What a person sees while a run goes on: notes; on a terminal the last steps in a table above a bar; else plain lines."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TypeVar

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_SECONDS = 10.0
"""A log file gets a progress line this often; a terminal is redrawn in place."""
WIDEST = 1000
"""Columns of a terminal in which any table has room."""
COUNTED_EVERY_SECONDS = 30.0
"""The same of a command that counts rows, after its first so many seconds: most end before."""
REDRAWN_EVERY_SECONDS = 0.1
"""What is counted may be tokens, thousands a second."""
ROWS = 6
"""Steps in the table: with its head and the bar it takes a third of a terminal of 24 lines."""
Row = tuple[int, dict[str, float], str]
"""Step, its metrics by name, its tokens a second."""
Part = TypeVar("Part", bound=Sized)


class Console:
    """Silent on every rank but the first.

    Args:
        rich: where to write; without it stderr.
    """

    def __init__(self, stage: str, speak: bool, rich: RichConsole | None = None) -> None:
        self.stage, self.speak = stage, speak
        self.rich = rich or RichConsole(soft_wrap=True, highlight=False, stderr=True)
        self.rows: deque[Row] = deque(maxlen=ROWS)
        self.live: Live | None = None
        columns = TextColumn(stage), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%  {task.fields[text]}")
        self.bar = Progress(*columns, console=self.rich)
        self.done = self.bar.add_task(stage, total=1.0, text="")
        self.started, self.tokens, self.last_line, self.first_fraction = time.monotonic(), 0.0, 0.0, None
        self.last_step: float | None = None

    def note(self, text: str) -> None:
        if self.speak:
            self.rich.print(Text.assemble((self.stage, "bold"), "  ", text))  # no markup: a note may quote anybody's text

    def step(
        self,
        step: int,
        fraction: float,
        tokens: float,
        shown: Mapping[str, float],
        table: Mapping[str, float] | None = None,
    ) -> None:
        """One step is done, `fraction` of the run; `tokens` it handled; `shown` are the few metrics worth a glance.

        Args:
            table: those for the table, by their whole names, where that is more.
        """
        if not self.speak:
            return
        self.tokens += tokens
        if self.first_fraction is None:
            self.started, self.tokens, self.first_fraction = time.monotonic(), 0.0, fraction
        now = time.monotonic()
        elapsed = now - self.started
        gained = fraction - self.first_fraction
        left = f"{_clock(elapsed / gained * (1 - fraction))} left" if gained > 0 else ""
        speed = f"{self.tokens / elapsed:,.0f} tokens/s" if elapsed > 0 and self.tokens else ""
        if self.rich.is_terminal and not self.rich.is_dumb_terminal:
            self.rows.append((step, dict(shown if table is None else table), self._own_speed(now, tokens)))
            self.draw(fraction, f"step {step}  {speed}  {left}")
        elif now - self.last_line > PLAIN_EVERY_SECONDS or fraction >= 1:
            self.last_line = now
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            self.rich.print(Text(f"{self.stage}  {fraction:4.0%}  step {step}  {metrics}  {speed}  {left}"))

    def count(self, total: int, what: str) -> Count:
        return Count(self, total, what)

    def counted(
        self, parts: Iterable[Part], total: int, what: str, tokens: Callable[[Part], float] = lambda _: 0.0
    ) -> Iterator[Part]:
        """The parts of `total` things in turn; of each that was dealt with it is told how far that is.

        Args:
            tokens: of a part.
        """
        count = self.count(total, what)
        for part in parts:
            yield part
            count.add(len(part), tokens(part))
        count.close()

    def close(self) -> None:
        """The terminal is as it was: the cursor is there, what is printed goes where it did."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def abandon(self) -> None:
        """The process is about to end inside a signal handler, where nothing may be waited for: a cursor, at least."""
        if self.live is not None:
            os.write(2, b"\x1b[?25h\n")

    def _own_speed(self, now: float, tokens: float) -> str:
        """Tokens a second of this step; the first has no beginning."""
        before, self.last_step = self.last_step, now
        return f"{tokens / (now - before):,.0f}" if before is not None and now > before and tokens else ""

    def draw(self, fraction: float, text: str) -> None:
        if self.live is None:
            self.live = Live(console=self.rich, get_renderable=self._drawn, transient=True)
            self.live.start()
        self.bar.update(self.done, completed=fraction, text=text)

    def _drawn(self) -> RenderableType:
        """With as many metrics as the terminal has room for, the first of them first."""
        rows = list(self.rows)  # the thread that draws is not the one that adds
        names = list(dict.fromkeys(name for _, values, _ in rows for name in values))
        while names:
            table = _table(rows, names)
            if Measurement.get(self.rich, self.rich.options.update(max_width=WIDEST), table).maximum <= self.rich.width:
                return Group(table, self.bar)
            names.pop()
        return self.bar


class Count:
    """How many of `total` things are done: on a terminal a bar, which goes when all are; else a line each half minute."""

    def __init__(self, console: Console, total: int, what: str) -> None:
        self.console, self.total, self.what = console, total, what
        self.done, self.tokens = 0, 0.0
        self.started = self.last = time.monotonic()
        self.on_terminal = console.rich.is_terminal and not console.rich.is_dumb_terminal
        if console.speak and self.on_terminal:
            console.draw(0.0, f"0 of {total} {what}")

    def add(self, done: int, tokens: float = 0.0) -> None:
        """So many more, and the tokens that were handled."""
        self.done, self.tokens = self.done + done, self.tokens + tokens
        console, now = self.console, time.monotonic()
        if not console.speak or now - self.last < (REDRAWN_EVERY_SECONDS if self.on_terminal else COUNTED_EVERY_SECONDS):
            return
        self.last, elapsed, fraction = now, now - self.started, min(self.done / self.total, 1.0)
        speed = f"  {self.tokens / elapsed:,.0f} tokens/s" if self.tokens else ""
        left = f"  {_clock(elapsed / fraction * (1 - fraction))} left" if fraction else ""
        text = f"{self.done} of {self.total} {self.what}{speed}{left}"
        if self.on_terminal:
            console.draw(fraction, text)
        else:
            console.rich.print(Text(f"{console.stage}  {fraction:4.0%}  {text}"))

    def close(self) -> None:
        self.console.close()


def _table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in ("step", *(re.sub("[/_]", "\n", name) for name in names), "tokens/s"):
        table.add_column(Text(head), justify="right", vertical="bottom", no_wrap=True)
    for step, values, speed in rows:
        table.add_row(str(step), *(f"{values[name]:.4g}" if name in values else "" for name in names), speed)
    return table


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
