"""Stopping all workers of a phase at once: a file that each of them looks for before it asks for more.

An error that cannot pass (a full disk, a teacher that was replaced, too many failures) would otherwise be met by one item
after the other, and each of them would be paid for before.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from distilbeam.storage.paths import list_files
from distilbeam.storage.stores import store_of
from distilbeam.teacher.protocol import TeacherChanged

STOP = "stop"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_places: ContextVar[tuple[Path, ...]] = ContextVar("places", default=())
_looked: dict[Path, tuple[float, bool]] = {}


class Stopped(Exception):  # noqa: N818  (nothing is wrong: others were told to stop, too)
    """The phase was stopped; what was answered is kept."""


@contextmanager
def stoppable(*places: Path) -> Iterator[None]:
    """Look into folders for the word to stop, inside the block; without them nobody stops anybody."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def stop_everybody() -> None:
    """Tell all workers of the phase to stop."""
    write_stop(_places.get())


def write_stop(places: tuple[Path, ...]) -> None:
    """Leave the word to stop in each of the folders that takes it."""
    for place in places:
        with suppress(OSError):
            store_of(place).make_folder(place)
            (place / STOP).touch()


def is_stopped() -> bool:
    """Tell whether somebody said so."""
    return any(_asked(place) for place in _places.get())


def require_going_on() -> None:
    """Raise `Stopped` if somebody said so."""
    if is_stopped():
        raise Stopped


def can_pass(error: BaseException) -> bool:
    """Tell whether trying again may help."""
    return not isinstance(error, (ValueError, TypeError, KeyError, TeacherChanged)) and not cannot_be_written(error)


def cannot_be_written(error: BaseException) -> bool:
    """Tell whether a file was refused for want of room or of permission, as the next one would be."""
    return isinstance(error, OSError) and error.errno in _FULL


def _asked(place: Path) -> bool:
    store = store_of(place)
    if not store.by_request:
        return (place / STOP).exists()
    then, found = _looked.get(place, (-store.look_s, False))
    if not found and time.monotonic() - then >= store.look_s:
        with suppress(OSError):
            found = bool(list_files(place, STOP))
        _looked[place] = time.monotonic(), found
    return found
