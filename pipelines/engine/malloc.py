"""Settings of malloc: memory that a worker frees and soon needs again stays its own."""

from __future__ import annotations

import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of malloc.h
_KEPT_BYTES = 256 * 2**20
_LARGE_BYTES = 32 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep up to 256 MiB of freed memory instead of returning it to the system at once.

    A worker frees and asks for the same arrays with every batch. By default the library learns that; where somebody has
    set `MALLOC_TRIM_THRESHOLD_`, as Dask does for its workers (64 KiB), it does not, and every batch pays for fresh pages:
    a fifth of the time of labelling with a cheap teacher.

    Returns:
      Whether the library is one that can be told: glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT_BYTES) and mallopt(_MMAP_THRESHOLD, _LARGE_BYTES))
