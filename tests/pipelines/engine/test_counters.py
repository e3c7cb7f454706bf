"""What a phase's counters add up to when its pipeline has ended."""

from __future__ import annotations

from types import SimpleNamespace

from apache_beam.metrics.execution import MetricKey, MetricResult
from apache_beam.metrics.metricbase import MetricName

from distilbeam.pipelines.engine.counters import NAMESPACE, totals


def test_a_counter_that_a_portable_runner_commits_as_nothing_is_nothing() -> None:
    def counter(step: str, name: str, committed: int) -> MetricResult:
        return MetricResult(MetricKey(step, MetricName(NAMESPACE, name)), committed, None)

    assert counter("a", "wait_us", 0).result is None, "which is what Prism's counters are read as"
    found = [counter("a", "wait_us", 0), counter("b", "wait_us", 5), counter("a", "rows", 3)]
    metrics = SimpleNamespace(query=lambda _: {"counters": found})
    assert totals(SimpleNamespace(metrics=lambda: metrics)) == {"wait_us": 5, "rows": 3}
