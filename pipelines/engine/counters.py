"""Counters of a phase: what its work costs, counted where it is done.

The counts are Beam counters of the namespace `distilbeam`, so that a runner's own display (Dataflow's page of a job, say)
shows them too; `totals` reads them when a pipeline has ended. Times are microseconds. Outside a pipeline counting does
nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from apache_beam.metrics import Metrics, MetricsFilter

NAMESPACE = "distilbeam"
MICROSECONDS = "_us"


def count(name: str, value: int = 1) -> None:
    """Add to a counter."""
    _counter(name).inc(value)


def count_seconds(name: str, seconds: float) -> None:
    """Add to the counter `name`_us."""
    count(name + MICROSECONDS, round(1e6 * seconds))


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the time that the block takes to the counter `name`_us."""
    start = time.perf_counter()
    try:
        yield
    finally:
        count_seconds(name, time.perf_counter() - start)


def totals(result: Any) -> Counter[str]:
    """Read the counters of a pipeline that has ended.

    Args:
      result: what `Pipeline.run` returned.

    Returns:
      Counts by name; empty where the runner keeps none (Dask's does not).
    """
    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))["counters"]
    except NotImplementedError:
        return Counter()
    sums: Counter[str] = Counter()
    for counter in found:
        sums[counter.key.metric.name] += counter.result or 0  # None is what Beam makes of a committed 0
    return sums


@cache
def _counter(name: str) -> Any:
    return Metrics.counter(NAMESPACE, name)
