"""What a person sees while a run goes on: progress bars and lines on stderr; stdout is left to results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainwright.loop import StepResult

GIB = 2**30


class Display:
    """A run's progress. Without a terminal it writes a plain line now and then instead of a bar."""

    def __init__(self, quiet: bool = False) -> None:
        self.out = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """A line that stays."""
        (self._bar.console if self._bar else self.out).print(text, soft_wrap=True, markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Rows under headings; all but the first column are aligned to the right."""
        # NOTE: not the table's own title, which would be wrapped to the width of the columns.
        self.out.print(title, style="bold", markup=False, soft_wrap=True)
        table = Table()
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def sample(self, pair: dict[str, str]) -> None:
        """A held-out prompt with what the model said before and after training, and what was written there."""
        self.out.rule("held-out sample")
        for name in ("prompt", "before", "after", "expected"):
            self.out.print(f"[bold]{name}[/bold]", escape(pair[name].strip()), sep="\n", soft_wrap=True)

    def start(self, steps: int, done: int) -> None:
        """Show the bar of the steps."""
        if not self.out.is_terminal:
            return
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(), console=self.out, transient=True, expand=True,
        )  # fmt: skip
        self._task = self._bar.add_task("steps", total=steps, completed=done, status="")
        self._bar.start()

    def step(self, result: StepResult, unit: str, rate: float, share: float | None, steps: int) -> None:
        """Show one step's figures; ``rate`` in units a second, ``share`` of the machine's matrix-product rate."""
        status = f"loss {result.loss:.4f}  lr {result.learning_rate:.1e}  {rate:,.0f} {unit}/s"
        status += f"  {share:.0%} of peak" if share is not None else ""
        status += f"  {result.peak_memory_bytes / GIB:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=result.step, status=status)
        elif result.step == 1 or result.step == steps or result.step % max(1, steps // 20) == 0:
            self.say(f"step {result.step}/{steps}  {status}")

    @contextmanager
    def preparing(self) -> Iterator[Callable[[str, int], None]]:
        """A spinner while model and data are prepared; is to be told what has been done so far, and how much of it."""
        with self.working("preparing model and data") as bar:

            def progress(what: str, done: int) -> None:
                if bar is not None:
                    bar.update(bar.task_ids[0], description=f"{what} {done:,} rows")

            yield progress

    @contextmanager
    def working(self, what: str) -> Iterator[Progress | None]:
        """A spinner with a count, for work that comes before or between steps."""
        if not self.out.is_terminal or self._bar is not None:
            yield None
            return
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=self.out, transient=True) as bar:
            bar.add_task(what)
            yield bar
