"""JSON lines are answered one for one, in their order and as they come."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from problem import make_table

from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.prediction.predict_files import PredictOptions
from distilbeam.pipelines.prediction.predict_lines import predict_lines


class Trickle(io.RawIOBase):
    """Gives what there is a few bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self.source, self.step = io.BytesIO(data), step

    def read1(self, size: int) -> bytes:
        return self.source.read(min(size, self.step))


def answers(student: Path, source: Any, **options: Any) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    sink = io.BytesIO()
    counts = predict_lines(open_model(student)[1], source, sink, PredictOptions(**options))
    return [json.loads(line) for line in sink.getvalue().decode().splitlines()], counts


@pytest.mark.parametrize("step", [1, 100, 2**20])
def test_every_line_has_its_answer_in_its_place(student: Path, step: int) -> None:
    table = make_table(20, 5, labelled=True)
    lines = [json.dumps({**row, "key": {"n": row["key"], "ü": [1, None]}}) for row in table.to_pylist()]
    lines.insert(3, "no JSON")
    data = "\n".join([*lines[:7], "", " ", *lines[7:]]).encode()
    found, counts = answers(student, Trickle(data, step), columns=("key", "absent"), top_k=2, batch_rows=3)
    assert counts == (21, 1)
    assert found[3]["prediction"] is None
    assert found[3]["reason"].startswith("the line is no JSON object")
    del found[3]
    expected = open_model(student)[1].predict(table, top_k=2).to_pylist()
    assert [list(row) for row in found] == [["key", "absent", *expected[0]]] * 20
    assert [row["key"]["n"] for row in found] == table["key"].to_pylist()
    for row, wanted in zip(found, expected, strict=True):
        assert (row["prediction"], row["top_classes"]) == (wanted["prediction"], wanted["top_classes"])
        assert row["confidence"] == pytest.approx(wanted["confidence"], rel=1e-6)
        assert row["top_probabilities"] == pytest.approx(wanted["top_probabilities"], rel=1e-6)


def test_half_a_surrogate_pair_is_carried(student: Path) -> None:
    found, _ = answers(student, io.BytesIO(b'{"x": [1, 0, 0, 0], "id": "\\ud800"}'), columns=("id",))
    assert (found[0]["id"], found[0]["prediction"]) == ("\ud800", "0")


def test_a_line_is_answered_before_the_next_one_comes(student: Path) -> None:
    """Two pipes, as of a program that asks and waits: this would hang if lines were gathered."""
    asked_out, asked_in = os.pipe()
    told_out, told_in = os.pipe()
    model = open_model(student)[1]
    with os.fdopen(asked_out, "rb") as source, os.fdopen(told_in, "wb") as sink:
        thread = threading.Thread(target=predict_lines, args=(model, source, sink, PredictOptions()), daemon=True)
        thread.start()
        with os.fdopen(told_out, "rb") as told, os.fdopen(asked_in, "wb", buffering=0) as asked:
            for x, expected in (([1, 0, 0, 0], "0"), ([0, 0, 1, 0], "2")):
                asked.write(json.dumps({"x": x}).encode() + b"\n")
                assert json.loads(told.readline())["prediction"] == expected
            asked.close()
            thread.join(timeout=30)
            assert not thread.is_alive()


def test_what_lines_cannot_hold_is_refused(student: Path, text_student: Path) -> None:
    with pytest.raises(ValueError, match="other names than those of the predictions, got reason"):
        answers(text_student, io.BytesIO(b""), columns=("reason",))
    said = json.loads((student / "student.json").read_text())
    said["config"]["input"]["kind"] = "image"
    (student / "student.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="JSON lines cannot hold what the student reads, image input of column x"):
        answers(student, io.BytesIO(b""))
