"""What a person sees while a run goes on: notes, a progress line on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_SECONDS = 10.0
"""A log file gets a progress line this often; a terminal is redrawn in place."""


class Console:
    """Silent on every rank but the first."""

    def __init__(self, stage: str, speak: bool) -> None:
        self.stage, self.speak = stage, speak
        self.rich = RichConsole(soft_wrap=True, highlight=False, stderr=True)
        self.progress: Progress | None = None
        self.started, self.tokens, self.last_line, self.first_fraction = time.monotonic(), 0.0, 0.0, None

    def note(self, text: str) -> None:
        if self.speak:
            self.rich.print(f"[bold]{self.stage}[/bold]  {_escaped(text)}")

    def step(self, step: int, fraction: float, tokens: float, shown: Mapping[str, float]) -> None:
        """One step is done, `fraction` of the run; `tokens` it handled; `shown` are the few metrics worth a glance."""
        if not self.speak:
            return
        self.tokens += tokens
        if self.first_fraction is None:
            self.started, self.tokens, self.first_fraction = time.monotonic(), 0.0, fraction
        elapsed = time.monotonic() - self.started
        gained = fraction - self.first_fraction
        left = f"{_clock(elapsed / gained * (1 - fraction))} left" if gained > 0 else ""
        speed = f"{self.tokens / elapsed:,.0f} tokens/s" if elapsed > 0 and self.tokens else ""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self.rich.is_terminal:
            self._bar().update(self._bar().task_ids[0], completed=fraction, text=f"step {step}  {metrics}  {speed}  {left}")
        elif time.monotonic() - self.last_line > PLAIN_EVERY_SECONDS or fraction >= 1:
            self.last_line = time.monotonic()
            self.rich.print(f"{self.stage}  {fraction:4.0%}  step {step}  {metrics}  {speed}  {left}")

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _bar(self) -> Progress:
        if self.progress is None:
            columns = (
                TextColumn(self.stage),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:3.0f}%  {task.fields[text]}"),
            )
            self.progress = Progress(*columns, console=self.rich, transient=True)
            self.progress.add_task(self.stage, total=1.0, text="")
            self.progress.start()
        return self.progress


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
