"""What a person sees of a run: one line per finished step, a bar while one is under way, and quiet logs.

Beam, TensorFlow and their libraries log through the standard loggers; below the chosen level they are kept out of the
picture, and ours are shown through rich, above the bar.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

NOISY = (
    *("absl", "apache_beam", "google", "grpc", "h5py", "huggingface_hub", "jax", "matplotlib", "onnxruntime", "PIL"),
    *("root", "tensorflow", "tokenizers", "torch", "torchao", "transformers"),
)


class Report(Protocol):
    """Called with the numbers of things done and of all things, and a few words about the latest."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None: ...


def plain_console(stderr: bool = False) -> Console:
    """Return a console that prints text as it is: no name of a file or a class is markup, an emoji or highlighted."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class Display:
    """Shows steps and their progress on a console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or plain_console()

    @classmethod
    def silent(cls) -> Display:
        """Return a display that shows nothing."""
        return cls(Console(quiet=True))

    @contextmanager
    def step(self, title: str) -> Iterator[Report]:
        """Show a step: a bar while it runs, a line with its time when it is done.

        Args:
          title: what is being done, in a few words.

        Yields:
          A function to call with the numbers of things done and of all things, and a note.
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
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(title, total=None, note="")

            def report(done: int, total: int, note: str = "", /) -> None:
                rate = progress.tasks[0].speed
                words = [note, "" if rate is None else f"{rate:,.0f}/s"]
                progress.update(task, completed=done, total=total, note="  ".join(filter(None, words)))

            yield report
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
    handler = RichHandler(console=console, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("distilbeam").setLevel(levels[level])
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else max(levels[level], logging.ERROR))
