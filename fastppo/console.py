"""What a run shows while it goes on: a live table and progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Column title -> (metric, format).
COLUMNS = {
    "reward": ("objective/scores", "{:.3f}"),
    "held out": ("eval/scores", "{:.3f}"),
    "loss": ("loss/nll", "{:.3f}"),
    "held-out loss": ("eval/nll", "{:.3f}"),
    "perplexity": ("eval/perplexity", "{:.2f}"),
    "KL": ("objective/kl", "{:.2f}"),
    "entropy": ("policy/entropy_avg", "{:.2f}"),
    "length": ("completions/mean_length", "{:.0f}"),
    "clipped": ("policy/clipfrac_avg", "{:.1%}"),
    "critic EV": ("val/explained_var", "{:.2f}"),
    "off band": ("rollout/out_of_band_rate", "{:.1%}"),
    "tok/s": ("perf/tokens_per_second", "{:,.0f}"),
    "s": ("time/step", "{:.1f}"),
}
# On a narrow terminal these give way, the first of them first.
LEAST_NEEDED = (
    "tok/s",
    "clipped",
    "off band",
    "s",
    "held out",
    "perplexity",
    "held-out loss",
    "critic EV",
    "length",
    "entropy",
    "KL",
    "loss",
)
PARTS_OF_A_STEP = ("rollout", "search", "reward", "score", "update")
COLUMN_GAP = 2
SHOWN_STEPS = 12
SHOWN_CHARACTERS = 2000
SHOWN_NOTES = 20
# C0 and C1 controls but tab and newline, halves of characters, and the marks that reverse the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Model output without the characters that could move a terminal's cursor, change its settings or reorder its text."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def format_metric(title: str, metrics: Mapping[str, float]) -> str | None:
    """The cell of column `title`; None where the step has no such metric."""
    metric, form = COLUMNS[title]
    value = metrics.get(metric)
    return None if value is None or not math.isfinite(value) else form.format(value)


def time_split(metrics: Mapping[str, float]) -> str:
    """Where the time of a step went, such as "rollout 61%, reward 2%, score 9%, update 28%"; "" where it is not known, or all in one of
    them."""
    total = metrics.get("time/step") or 0.0
    seconds = {part: metrics.get(f"time/{part}") for part in PARTS_OF_A_STEP}
    shares = [f"{part} {value / total:.0%}" for part, value in seconds.items() if value is not None and total > 0]
    return ", ".join(shares) if len(shares) > 1 else ""


class Reporter:
    """Shows the steps of a run; use it as a context manager around them.

    What only shows may fail: an output that is closed, full or of another encoding is given up, which standard error says once.

    quiet: show nothing (tests, several processes). console: where to write; by default the terminal's standard output.
    every: show each `every`-th step alone, the last one, and those with an evaluation.
    """

    def __init__(
        self, total_steps: int, *, quiet: bool = False, console: Console | None = None, every: int = 1
    ) -> None:
        self.total_steps, self.quiet, self.every = total_steps, quiet, every
        self.console = console or Console(highlight=False)
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.noted: set[str] = set()
        self.live: Live | None = None
        columns = (
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=self.console)
        self.steps_task = self.progress.add_task("steps", total=total_steps, note="")
        self.phase_task = self.progress.add_task("", total=None, note="")

    def __enter__(self) -> Reporter:
        if self.console.is_terminal and not self.quiet:
            with self._may_fail():
                self.live = Live(self._view(), console=self.console, refresh_per_second=6)
                self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.live is not None:
            with self._may_fail():
                self.progress.remove_task(self.phase_task)
                self.live.update(self._view())
                self.live.stop()
            self.live = None

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """What goes wrong inside ends the display, not the run. Rich answers a broken pipe with SystemExit."""
        try:
            yield
        except (Exception, SystemExit) as error:
            live, self.live, self.quiet = self.live, None, True
            with suppress(Exception, SystemExit):
                if live is not None:
                    live.stop()
            reason = error.__context__ if isinstance(error, SystemExit) else error
            with suppress(Exception):
                print(f"fastppo: the run goes on without a display: {reason}", file=sys.stderr, flush=True)

    def phase(self, name: str, done: int, total: int, note: str = "") -> None:
        """Progress within a step: rollout, reward, update; `note` stands beside the bar."""
        if self.live is not None:
            with self._may_fail():
                self.progress.update(self.phase_task, description=name, completed=done, total=total, note=note)
                self.live.update(self._view())

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One more step of the run is done."""
        evaluated = any(name.startswith("eval/") for name in metrics)
        if step % self.every and step != self.total_steps and not evaluated:
            return
        if not self.rows:  # the steps before a resume, and a first step that warms up, say nothing about the time left
            self.progress.reset(self.steps_task)
        self.rows = [*self.rows, (step, metrics)][-SHOWN_STEPS:]
        if self.live is not None:
            with self._may_fail():
                self.progress.update(self.steps_task, completed=step)
                self.live.update(self._view())
        elif not self.quiet:
            cells = ((title, format_metric(title, metrics)) for title in COLUMNS)
            parts = [f"{title} {cell}" for title, cell in cells if cell is not None]
            parts += [f"({split})" for split in [time_split(metrics)] if split]
            self._print(f"step {step}/{self.total_steps}  " + "  ".join(parts))

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        self._print(text)

    def note_once(self, text: str) -> None:
        """A note, unless one that differs in its numbers only was shown before; after `SHOWN_NOTES` different ones there are no more."""
        kind = re.sub(r"\d+", "0", text)
        if kind in self.noted or len(self.noted) > SHOWN_NOTES:
            return
        self.noted.add(kind)
        self.note(text if len(self.noted) <= SHOWN_NOTES else "further notes of this kind are not shown")

    def sample(self, title: str, prompt: str, completion: str, score: float) -> None:
        """A completion under its prompt. Every line of the model's is marked as such: it cannot pass for a record of the run."""
        self._print(f"{title}  score {score:.3f}")
        for text in (prompt, completion):
            cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " ..."
            for line in cut.splitlines() or [""]:
                self._print(f"  | {line}")

    def _print(self, text: str) -> None:
        if not self.quiet:
            with self._may_fail():
                encoding = self.console.encoding  # a character that the terminal lacks must not end the display
                shown = printable(text).encode(encoding, "replace").decode(encoding)
                self.console.print(Text(shown), soft_wrap=True)

    def _view(self) -> Group:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, COLUMN_GAP, 0, 0))
        columns = self._columns_that_fit()
        for title in columns:
            table.add_column(title, justify="right", no_wrap=True)
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        split = time_split(self.rows[-1][1]) if self.rows else ""
        return Group(table, *([Text(f"time of the last step: {split}", style="dim")] if split else []), self.progress)

    def _columns_that_fit(self) -> dict[str, list[str]]:
        """Title -> cells of the steps that are shown, without the columns that nothing stands in or that the terminal has no room for."""
        columns = {"step": [str(step) for step, _ in self.rows]}
        columns |= {title: [format_metric(title, metrics) or "" for _, metrics in self.rows] for title in COLUMNS}
        columns = {title: cells for title, cells in columns.items() if title == "step" or any(cells)}
        for title in LEAST_NEEDED:
            width = sum(max(map(len, [name, *cells])) + COLUMN_GAP for name, cells in columns.items())
            if width > self.console.width:
                columns.pop(title, None)
        return columns
