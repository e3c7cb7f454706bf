"""Where an engine's own lines go: Beam's logs and the tracebacks of its threads into one file, one sentence to the user."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ENGINES = ("apache_beam", "grpc", "dask", "distributed")
_LONGEST = 400  # characters of a sentence


@contextmanager
def engine_lines(file: Path | None) -> Iterator[None]:
    """Send what Beam, grpc and their threads say to a file until the block ends, and only ours to where logs were shown.

    Args:
      file: the file, written anew; None leaves everything as it is, and so does the log level debug.
    """
    loggers = [logging.getLogger(name) for name in _ENGINES]
    if file is None or loggers[0].level == logging.DEBUG:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, mode="a", encoding="utf-8", delay=True)  # no file where nothing is said
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()  # Beam logs what a job service says there
    shown = list(root.handlers)
    levels = [logger.level for logger in loggers]
    said_before = threading.excepthook

    def keep(failed: Any) -> None:
        lines = traceback.format_exception(failed.exc_type, failed.exc_value, failed.exc_traceback)
        if any(f"/{name}/" in line for line in lines for name in _ENGINES):  # a thread of an engine that is gone
            with file.open("a", encoding="utf-8") as more:
                more.write("".join(lines))
        else:
            said_before(failed)

    threading.excepthook = keep
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    for each in shown:
        each.addFilter(_is_ours)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for each in shown:
            each.removeFilter(_is_ours)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        threading.excepthook = said_before
        handler.close()


def lines_are_in(file: Path | None) -> str:
    """Return the end of a sentence that names the file, where anything was said."""
    said = file is not None and file.exists() and file.stat().st_size > 0
    return f"; the engine's lines are in {file}" if said else ""


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.startswith("distilbeam")


def first_line(error: BaseException) -> str:
    """Return what an engine says went wrong, without its traceback."""
    details = getattr(error, "details", None)
    if callable(details):  # of grpc: the engine does not answer
        return f"the engine is gone, {details()}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if ": " in line and not line.startswith(("File ", "Traceback", "at "))]
    said = (causes or lines or [type(error).__name__])[-1]
    return said if len(said) < _LONGEST else f"{said[:_LONGEST]}…"
