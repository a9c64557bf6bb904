"""A command's console: lines, and one progress bar at a time; where there is no terminal, a line of progress now and
then."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """active: False on ranks that say nothing. stderr: for commands whose stdout is a result; their bar goes away when
    it ends."""

    def __init__(self, active: bool = True, *, stderr: bool = False):
        self.active, self.stderr = active, stderr
        stream = sys.stderr if stderr else sys.stdout
        self.console = Console(stderr=stderr, quiet=not active, highlight=False, soft_wrap=not stream.isatty())
        self.bar: Progress | None = None

    def say(self, text: str) -> None:
        self.console.print(text)

    def start(self, title: str, total: int | None = None, done: int = 0, *, every_s: float = 0.0) -> None:
        """Begin to count up to `total` (None: `update` says it later, or nobody knows). every_s: seconds between lines
        where there is no terminal; 0 = a line at every tenth of the total."""
        self.title, self.total, self.every_s, self.said = title, total, every_s, time.monotonic()
        if not self.active or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            refresh_per_second=4,
            transient=self.stderr,
        )
        self.task = self.bar.add_task(title, total=total, completed=done, count=self._count(done), note="")
        self.bar.start()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        if not self.active:
            return
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.update(self.task, total=self.total, completed=done, count=self._count(done), note=note)
        elif self._due(done):
            self.said = time.monotonic()
            self.console.print(f"{self.title} {self._count(done)}  {note}")

    def _count(self, done: int) -> str:
        return f"{done}/{self.total}" if self.total is not None else f"{done:,}"

    def _due(self, done: int) -> bool:
        if self.every_s:
            return time.monotonic() - self.said > self.every_s
        return self.total is not None and (done == self.total or done % max(self.total // 10, 1) == 0)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
