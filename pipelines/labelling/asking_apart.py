"""Asking about rows in a process apart, because the process that asked about them before has died.

    python -m distilbeam.pipelines.labelling.asking_apart FOLDER

The process asks request by request and writes down each before it is sent, in files that outlive it. When it dies, the
request in flight is quartered and another process goes on, down to the row that it dies of: among n rows that takes log4 n
further processes, which load the teacher anew, and at most 2 log2 n requests. What was answered is kept.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.storage.private_folders import private_folder
from distilbeam.teacher.predict import Answers, RowError
from distilbeam.teacher.protocol import TeacherChanged, TeacherMisfit, TeacherUnavailable

Range = tuple[int, int]

FRESH, IN_FLIGHT, DONE = range(3)
_WORDS = 4000
_PIECES = 4

log = logging.getLogger("distilbeam.label")


@dataclass(frozen=True)
class Question:
    """What is asked apart.

    Attributes:
      teacher: the teacher, as `model_cache.teacher_text` describes it.
      rows: the rows.
      num_classes: number of classes that each answer must have.
      batch_size: most rows in one request.
    """

    teacher: str
    rows: pa.RecordBatch
    num_classes: int
    batch_size: int


def ask_apart(question: Question) -> Answers:
    """Ask about rows of which one may kill the process that asks.

    Returns:
      The answers; a row that killed its process every time is among the errors.

    Raises:
      RuntimeError: the process dies before it asks anything, or ends with an error.
    """
    with private_folder("apart") as folder:
        desk = _Desk.make(folder, question)
        todo = _requests(len(question.rows), question.batch_size)
        deaths: dict[int, int] = {}
        while todo:
            status, said = _run(folder, todo)
            _raise_kept(folder)
            if status == 0:
                break
            todo = _after_death(desk, todo, deaths, _how(status), said)
        return desk.answers(deaths)


def _after_death(desk: _Desk, todo: Sequence[Range], deaths: dict[int, int], how: str, said: str) -> list[Range]:
    """Return what is still to be asked after a process died; a row that it was asked alone is given up."""
    (flying,) = np.nonzero(desk.states == IN_FLIGHT)
    if not len(flying):
        raise RuntimeError(f"the process that asks the teacher apart {how} before it asked anything{said}")
    start, stop = int(flying[0]), int(flying[-1]) + 1
    for row in range(start, stop):
        deaths[row] = deaths.get(row, 0) + 1
    log.info("the process that asked the teacher about %d row(s) %s; it is found out which of them", stop - start, how)
    if stop - start == 1:
        message = f"the process that asks the teacher {how} whenever this row is asked"
        desk.keep([RowError(start, "teacher", message, deaths[start])])
        desk.states[start] = DONE
        pieces: list[Range] = []
    else:
        desk.states[start:stop] = FRESH
        edges = np.unique(np.linspace(start, stop, _PIECES + 1).astype(int)).tolist()
        pieces = list(pairwise(edges))
    rest = [(a, b) for a, b in todo if (a, b) != (start, stop) and (desk.states[a:b] == FRESH).any()]
    return [*pieces, *rest]


def _raise_kept(folder: Path) -> None:
    """Raise what the process raised and did not die of."""
    path = folder / "error.json"
    if path.exists():
        name, message = json.loads(path.read_text())
        known = (TeacherChanged, TeacherMisfit, TeacherUnavailable, ValueError)
        kinds: dict[str, type[Exception]] = {kind.__name__: kind for kind in known}
        raise kinds.get(name, RuntimeError)(message if name in kinds else f"{name}: {message}")


def _requests(rows: int, batch_size: int) -> list[Range]:
    return [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


def _run(folder: Path, todo: Sequence[Range]) -> tuple[int, str]:
    (folder / "todo.json").write_text(json.dumps(list(todo)))
    command = [sys.executable, "-P", "-m", __spec__.name, str(folder)]  # modules are found as here
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, **single}
    )
    last = [line for line in ended.stderr[-_WORDS:].splitlines() if line.strip()][-1:]
    return ended.returncode, "".join(f": {line}" for line in last)


def _how(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"was killed by {name}" + (" (out of memory, perhaps)" if -status == signal.SIGKILL else "")
    return f"ended with status {status}"


class _Desk:
    """The files that both processes look at: rows, answers, and how far each row is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "question.json").read_text())
        self.states: npt.NDArray[np.uint8] = np.load(folder / "states.npy", mmap_mode="r+")
        self.logits: npt.NDArray[np.float32] = np.load(folder / "logits.npy", mmap_mode="r+")

    @classmethod
    def make(cls, folder: Path, question: Question) -> _Desk:
        rows = question.rows
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_batch(rows)
        np.save(folder / "states.npy", np.zeros(len(rows), np.uint8))
        np.save(folder / "logits.npy", np.full((len(rows), question.num_classes), np.nan, np.float32))
        facts = {"teacher": question.teacher, "num_classes": question.num_classes, "path": sys.path}
        (folder / "question.json").write_text(json.dumps(facts))
        return cls(folder)

    def rows(self) -> pa.RecordBatch:
        with pa.OSFile(str(self.folder / "rows.arrow"), "rb") as source:
            return pa.ipc.open_file(source).get_batch(0)

    def keep(self, errors: Sequence[RowError], calls: int = 0, requests: int = 0) -> None:
        record = {"errors": [vars(error) for error in errors], "calls": calls, "requests": requests}
        with (self.folder / "said.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def answers(self, deaths: dict[int, int]) -> Answers:
        path = self.folder / "said.jsonl"
        said = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        errors = sorted((RowError(**error) for one in said for error in one["errors"]), key=lambda error: error.row)
        ok = np.ones(len(self.states), bool)
        ok[[error.row for error in errors]] = False
        calls = sum(one["calls"] for one in said) + sum(deaths.values())
        return Answers(np.array(self.logits), ok, errors, calls, sum(one["requests"] for one in said))


def main() -> None:
    """Ask about the ranges of rows that a folder names."""
    desk = _Desk(Path(sys.argv[1]))
    sys.path[:] = desk.facts["path"]
    try:
        _ask(desk)
    except Exception as e:  # noqa: BLE001  # who started this process raises it
        (desk.folder / "error.json").write_text(json.dumps([type(e).__name__, str(e)]))
        sys.exit(1)


def _ask(desk: _Desk) -> None:
    import torch

    from distilbeam.pipelines.engine.model_cache import cached_teacher
    from distilbeam.teacher.predict import ask

    torch.set_num_threads(1)
    teacher, rows = cached_teacher(desk.facts["teacher"]), desk.rows()
    for start, stop in json.loads((desk.folder / "todo.json").read_text()):
        desk.states[start:stop] = IN_FLIGHT
        answers = ask(teacher, rows.slice(start, stop - start), desk.facts["num_classes"], batch_size=stop - start)
        desk.logits[start:stop] = answers.logits
        errors = [RowError(start + e.row, e.stage, e.error, e.attempts) for e in answers.errors]
        desk.keep(errors, answers.calls, answers.requests)
        desk.states[start:stop] = DONE


if __name__ == "__main__":
    main()
