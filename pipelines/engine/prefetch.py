"""Reading ahead: the next item is made in a thread of its own while the one before is worked on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from distilbeam.storage.stores import store_of

Value = TypeVar("Value")
_END: Any = object()
_spare: ContextVar[bool] = ContextVar("spare", default=False)


@contextmanager
def sparing(processor: bool) -> Iterator[None]:
    """Say whether `read_from` has a processor of its own to read with inside the block; without a word it has none."""
    token = _spare.set(processor)
    try:
        yield
    finally:
        _spare.reset(token)


def read_ahead(items: Iterable[Value]) -> Iterator[tuple[Value, float]]:
    """Begin to make items at once, and yield each while the next one is being made: at most one ahead.

    Reading and decoding Parquet drop the interpreter's lock, so a worker with a core to spare labels while it reads.

    Args:
      items: the items; iterated in another thread, which ends with what is returned.

    Returns:
      An iterator of the items, each with the seconds that making it took. It raises what making an item raises, in the
      place of the item.
    """
    iterator = iter(items)
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    return _handed_over(iterator, thread, thread.submit(_timed_next, iterator))


def read_from(path: str, items: Iterable[Value]) -> Iterator[tuple[Value, float]]:
    """Read ahead from an object store, and from a file system where a processor is to spare (`sparing`); else in turn.

    A store's answer takes tens of milliseconds, in which a worker can label. Reading a file is copying, which gains time
    on a processor that would be idle and takes it from a worker's neighbour otherwise.

    Args:
      path: where the items are read.
      items: the items.

    Returns:
      See `read_ahead`.
    """
    return read_ahead(items) if _spare.get() or store_of(path).by_request else read_in_turn(items)


def read_in_turn(items: Iterable[Value]) -> Iterator[tuple[Value, float]]:
    """Yield items, each with the seconds that making it took."""
    iterator = iter(items)
    while True:
        item, seconds = _timed_next(iterator)
        if item is _END:
            return
        yield item, seconds


def _handed_over(
    iterator: Iterator[Value], thread: ThreadPoolExecutor, coming: Future[tuple[Any, float]]
) -> Iterator[tuple[Value, float]]:
    with thread:
        while True:
            item, seconds = coming.result()
            if item is _END:
                return
            coming = thread.submit(_timed_next, iterator)
            yield item, seconds


def _timed_next(iterator: Iterator[Value]) -> tuple[Value, float]:
    start = time.perf_counter()
    item = next(iterator, _END)
    return item, time.perf_counter() - start
