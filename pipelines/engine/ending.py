"""Ending a command: Ctrl-C told to the phase that is at work and kept from its processes, and nothing left running.

It imports nothing, so that the command line may ask before Beam is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_END_S = 5.0  # for an engine to hear that its job is over
_at_work: list[tuple[Callable[[], None], threading.Event]] = []
_running: list[Callable[[], None]] = []
_given_up = threading.Event()


class Interrupted(RuntimeError):  # noqa: N818  (named after what happened)
    """The phase was told to stop, by Ctrl-C for instance, and has kept what it had."""


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Let `interrupt` call `stop` inside the block.

    Yields:
      Whether it did.
    """
    interrupted = threading.Event()
    _at_work.append((stop, interrupted))
    try:
        yield interrupted
    finally:
        _at_work.pop()


def interrupt() -> bool:
    """Tell the phase that is at work to stop; `run_phase` then raises `Interrupted`. False where none is, or was told before."""
    if not _at_work:
        return False
    stop, interrupted = _at_work[-1]
    if interrupted.is_set():
        return False
    interrupted.set()
    stop()
    return True


@contextmanager
def interrupt_passed_over() -> Iterator[None]:
    """Pass Ctrl-C over inside the block, and for good in the processes that it starts: a cluster of a runner's own, say.

    They inherit that the signal is ignored. A blocked one would not do: Python's own start of a process unblocks it.
    """
    if threading.current_thread() is not threading.main_thread():  # others may not change it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended_with_process(end: Callable[[], None]) -> Iterator[None]:
    """Have `end` called where the process ends inside the block, so that nothing is left running elsewhere."""
    _running.append(end)
    try:
        yield
    finally:
        _running.remove(end)


def end_running() -> None:
    """End what runs elsewhere, as far as it can be reached within seconds."""

    def end_all() -> None:
        for end in reversed(list(_running)):
            with suppress(Exception):  # of any runner; one that is gone cannot be told, and the process ends anyway
                end()

    if _running:
        ending = threading.Thread(target=end_all, daemon=True)
        ending.start()
        ending.join(_END_S)


def give_up() -> None:
    """Take note that a pipeline was left running in threads of this process."""
    _given_up.set()


def end_given_up(status: int) -> None:
    """End the process at once if a pipeline was given up: its threads would keep the interpreter from ending."""
    if _given_up.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
