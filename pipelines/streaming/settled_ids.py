"""Which messages a dataset has settled, by their ids: what a source without offsets delivers again is known by them.

A message's window follows from the message alone, so that only the ids of one window's panes are looked at, however many
messages there were.
"""

from __future__ import annotations

import threading
from datetime import datetime

import pyarrow.parquet as pq
from apache_beam.transforms.window import IntervalWindow

from distilbeam.pipelines.streaming.journal import MESSAGES, Journal, ids_folder
from distilbeam.pipelines.transforms.select_examples import window_name
from distilbeam.storage.paths import readable, to_path

_WINDOWS = 8  # whose ids are kept in memory


class SettledIds:
    """The ids that a dataset's panes have settled; those of the windows asked for last are in memory.

    Args:
      dataset: the dataset.
      source: what the messages come from.
    """

    def __init__(self, dataset: str, source: str) -> None:
        self.dataset = dataset
        self._journal = Journal(dataset, source)
        self._keys: dict[str, list[str]] = {}  # by a window's name, the panes that are committed
        self._lengths_s: set[float] = set()  # of their windows: a former job's may have been others
        self._ids: dict[str, tuple[int, set[str]]] = {}  # by a name, how many of its panes were read, and their ids
        self._lock = threading.Lock()

    def hurry(self) -> None:
        """Look the next time, whenever that is."""
        self._journal.hurry()

    def look(self) -> list[str]:
        """Return the ids of panes that have been committed since the last call."""
        found: list[str] = []
        for facts in self._journal.look():
            if facts.get(MESSAGES):
                found += self._read(facts["key"])
                start, end = (datetime.fromisoformat(text) for text in facts["window"].split("-"))
                with self._lock:
                    self._keys.setdefault(facts["window"], []).append(facts["key"])
                    self._lengths_s.add((end - start).total_seconds())
        return found

    def has(self, message_id: str, time_s: float) -> bool:
        """Tell whether a message of a time is settled."""
        with self._lock:
            names = {_window_of(time_s, length_s) for length_s in self._lengths_s}
            keys = {name: list(self._keys[name]) for name in names if name in self._keys}
        return any(message_id in self._ids_of(name, keys[name]) for name in keys)

    def _ids_of(self, name: str, keys: list[str]) -> set[str]:
        count, ids = self._ids.pop(name, (0, set()))
        for key in keys[count:]:
            ids.update(self._read(key))
        self._ids[name] = len(keys), ids
        while len(self._ids) > _WINDOWS:
            del self._ids[next(iter(self._ids))]
        return ids

    def _read(self, key: str) -> list[str]:
        file = to_path(ids_folder(self.dataset)) / f"{key}.parquet"
        ids: list[str] = pq.read_table(readable(file), partitioning=None)["message_id"].to_pylist()
        return ids


def _window_of(time_s: float, length_s: float) -> str:
    start = time_s // length_s * length_s
    return window_name(IntervalWindow(start, start + length_s))
