"""Reading ahead: the next item is made in a thread of its own while the one before is worked on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Value = TypeVar("Value")
_END: Any = object()


def read_ahead(items: Iterable[Value]) -> Iterator[tuple[Value, float]]:
    """Yield items while the next one is being made, one at a time and at most one ahead.

    Reading and decoding Parquet drop the interpreter's lock, so a worker with a core to spare labels while it reads.

    Args:
      items: the items; iterated in another thread, which ends with this generator.

    Yields:
      An item, and the seconds that making it took.

    Raises:
      Exception: whatever making an item raises, in the place of the item.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(_timed_next, iterator)
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
