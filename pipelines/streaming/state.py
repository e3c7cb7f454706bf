"""What a streaming job is doing, as a person, a program and a monitor see it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_RATE_S = 30.0  # over which the rate is measured


@dataclass
class StreamState:
    """The state of a job, from what is committed and what the brokers say.

    Attributes:
      settled: messages that are settled, of those that this job has seen come.
      labels: labels committed by this job.
      dead: dead letters committed by this job, by stage.
      panes: panes committed by this job.
      lag: by partition, messages that are not settled.
      window: end of the latest window with a label.
      watermark: end of the latest window that is committed, with labels or without.
      restarts: times the pipeline was submitted again.
    """

    settled: int = 0
    labels: int = 0
    dead: dict[str, int] = field(default_factory=dict)
    panes: int = 0
    lag: dict[int, int] = field(default_factory=dict)
    window: str = ""
    watermark: str = ""
    restarts: int = 0
    _committed_at: float | None = None
    _history: list[tuple[float, int]] = field(default_factory=list)

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add what a pane has committed."""
        self.panes += 1
        self.labels += facts["rows"]
        for stage, count in facts.get("dead", {}).items():
            self.dead[stage] = self.dead.get(stage, 0) + count
        self.settled += sum(last - first + 1 for pairs in facts.get("offsets", {}).values() for first, last in pairs)
        self.settled += facts.get("messages", 0)
        end = str(facts.get("window", "")).rpartition("-")[2]
        self.watermark = max(self.watermark, end)
        if facts["rows"]:
            self.window = max(self.window, end)
        self._committed_at = time.time()
        self._history.append((time.monotonic(), facts["rows"]))

    @property
    def dead_letters(self) -> int:
        """Dead letters of all stages."""
        return sum(self.dead.values())

    def rate(self) -> float:
        """Return the labels committed per second, over the last half minute."""
        start = time.monotonic() - _RATE_S
        self._history = [item for item in self._history if item[0] >= start]
        return sum(rows for _, rows in self._history) / _RATE_S

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        since = None if self._committed_at is None else round(time.time() - self._committed_at, 1)
        return {
            "labels": self.labels,
            "dead": self.dead,
            "settled": self.settled,
            "panes": self.panes,
            "lag": {str(partition): lag for partition, lag in sorted(self.lag.items())},
            "window": self.window,
            "watermark": self.watermark,
            "labels_per_s": round(self.rate(), 1),
            "last_commit_s": since,
            "restarts": self.restarts,
        }

    def sentence(self) -> str:
        """Say it in a line."""
        dead = "".join(f", {count:,} {stage}" for stage, count in sorted(self.dead.items()))
        lag = f"; {sum(self.lag.values()):,} not settled yet" if self.lag else ""
        return f"{self.labels:,} labels ({self.rate():,.0f}/s), {self.dead_letters:,} dead letters{dead}{lag}"

    def exposition(self) -> str:
        """Return the state in the text format of Prometheus."""
        lines = [
            *_metric("labels_total", "counter", "Labels committed by this job.", {"": self.labels}),
            *_metric(
                "dead_letters_total",
                "counter",
                "Messages without a label.",
                {f'{{stage="{s}"}}': n for s, n in self.dead.items()},
            ),
            *_metric("panes_total", "counter", "Shards and records committed.", {"": self.panes}),
            *_metric(
                "lag_messages",
                "gauge",
                "Messages that are not settled.",
                {f'{{partition="{p}"}}': n for p, n in self.lag.items()},
            ),
            *_metric("restarts_total", "counter", "Times the pipeline was submitted again.", {"": self.restarts}),
        ]
        if self.watermark[:1].isdigit():
            seconds = datetime.fromisoformat(self.watermark).timestamp()
            lines += _metric("watermark_seconds", "gauge", "Time up to which windows are committed.", {"": seconds})
        if self._committed_at is not None:
            lines += _metric(
                "last_commit_seconds", "gauge", "When the last pane was committed.", {"": self._committed_at}
            )
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, values: Mapping[str, float]) -> list[str]:
    full = f"distilbeam_stream_{name}"
    return [f"# HELP {full} {text}", f"# TYPE {full} {kind}", *(f"{full}{which} {n}" for which, n in values.items())]


def serve_state(state: StreamState, port: int) -> int:
    """Serve the state at `/metrics` until this process ends.

    Returns:
      The port, which is any free one where 0 is asked for.

    Raises:
      ValueError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            plain = self.path != "/state.json"
            body = (state.exposition() if plain else json.dumps(state.to_json())).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4" if plain else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:  # one line a scrape would drown ours
            return

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except OSError as e:
        raise ValueError(f"--metrics-port: {port} cannot be listened at ({e.strerror}); choose another") from e
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])
