"""Stopping all workers of a phase at once: files that each of them looks for before it asks for more.

An error that cannot pass (a full disk, a teacher that was replaced, too many failures) would otherwise be met by one item
after the other, and each of them would be paid for before.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from distilbeam.storage.paths import list_files
from distilbeam.storage.stores import store_of
from distilbeam.teacher.protocol import TeacherChanged

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)
_places: ContextVar[tuple[Path, ...]] = ContextVar("places", default=())
_looked: dict[Path, tuple[float, bool]] = {}
_process_ends = threading.Event()


class Stopped(Exception):  # noqa: N818  (nothing is wrong: others were told to stop, too)
    """The phase was stopped; what was answered is kept."""


@contextmanager
def stoppable(*places: Path) -> Iterator[None]:
    """Look for files that say to stop, inside the block; without them nobody stops anybody."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def stop_everybody() -> None:
    """Tell all workers of the phase to stop."""
    write_stop(_places.get())


def write_stop(places: tuple[Path, ...]) -> None:
    """Leave the word to stop at each of the places that takes it."""
    for place in places:
        with suppress(OSError):
            store_of(place).make_folder(place.parent)
            place.touch()


def stop_process() -> None:
    """Tell all workers of this process to stop, for good: it is about to end."""
    _process_ends.set()


def is_stopped() -> bool:
    """Tell whether somebody said so."""
    return _process_ends.is_set() or any(_asked(place) for place in _places.get())


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
        return place.exists()
    then, found = _looked.get(place, (-store.look_s, False))
    if not found and time.monotonic() - then >= store.look_s:
        with suppress(OSError):
            found = bool(list_files(place.parent, place.name))
        _looked[place] = time.monotonic(), found
    return found
