"""The display of a run: one line per finished step, a bar while one is under way, and quiet logs.

Beam, TensorFlow and their libraries log through the standard loggers; below the chosen level they are kept out of the
picture, and ours are shown through rich, above the bar.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from distilbeam.progress import Progress

NOISY = (
    *("absl", "apache_beam", "google", "grpc", "h5py", "huggingface_hub", "jax", "matplotlib", "onnxruntime", "PIL"),
    *("root", "tensorflow", "tokenizers", "torch", "torchao", "transformers"),
)


_NO_EDGE = 100_000  # columns of a file: a table is as wide as what is in it, and nothing is cut


def plain_console(stderr: bool = False) -> Console:
    """Return a console that prints text as it is: no name of a file or a class is markup, an emoji or highlighted.

    Where the output is no terminal (a file, a pipe) it has no right edge.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=None if terminal else _NO_EDGE)


class _Bar(Progress):
    def __init__(self, bars: Bars, title: str) -> None:
        self._bars, self._task = bars, bars.add_task(title, total=None, note="")

    def step(self, done: int, total: int, note: str = "") -> None:
        rate = self._bars.tasks[0].speed
        words = [note, "" if rate is None else f"{rate:,.0f}/s"]
        self._bars.update(self._task, completed=done, total=total, note="  ".join(filter(None, words)))


class Display:
    """Shows steps and their progress on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or plain_console()

    @classmethod
    def silent(cls) -> Display:
        """Return a display that shows nothing."""
        return cls(Console(quiet=True))

    @contextmanager
    def step(self, title: str) -> Iterator[Progress]:
        """Show a step: a bar while it runs, a line with its time when it is done.

        Args:
          title: what is being done, in a few words.

        Yields:
          What to tell of things done.
        """
        start = time.perf_counter()
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            yield _Bar(bars, title)
        took = f"{time.perf_counter() - start:.1f} s"
        self.console.print(Text.assemble("  ", ("✓", "green"), f" {title} ", (took, "dim")))

    @contextmanager
    def waiting(self, title: str) -> Iterator[None]:
        """Show that something without a measure is under way, and nothing when it has ended."""
        with self.console.status(Text(f"{title} ...")):
            yield

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self.console.print(Text(sentence), soft_wrap=True)


class _Lines(logging.Handler):
    """Writes each record as a line, where no terminal has a width for rich to fill."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)-8s %(message)s", "%x %X"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, with its traceback if it has one."""
        try:
            self._console.print(self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False)
        except Exception:  # noqa: BLE001  # logging must not end what it is about
            self.handleError(record)


def configure_logs(level: str, console: Console) -> None:
    """Show our log from `level` on, other libraries' only from one level above it (all of them at "debug").

    Args:
      level: "debug", "info", "warning" or "error".
      console: where to show them.

    Raises:
      ValueError: an unknown level.
    """
    levels = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    if level not in levels:
        raise ValueError(f"--log-level must be one of {', '.join(levels)}, got {level}")
    handler: logging.Handler = _Lines(console)
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("distilbeam").setLevel(levels[level])
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else max(levels[level], logging.ERROR))
