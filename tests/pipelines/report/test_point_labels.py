"""The numbers of the plot of accuracy cover no line, no point and no other number: looked at pixel by pixel."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distilbeam.pipelines.report.plots import STYLE, _accuracy

LIGHT = 225  # the grid's grey is 236, antialiased edges of what is drawn are darker


def results(accuracies: list[float], teacher: float, uniform: float | None, final: float | None) -> dict[str, Any]:
    students = [{"labels": 80 * i, "accuracy": value} for i, value in enumerate(accuracies)]
    found: dict[str, Any] = {"students": students, "teacher": {"accuracy": teacher}, "evaluated_on": "test"}
    last = students[-1]["labels"]
    found |= {} if uniform is None else {"uniform": {"labels": last, "accuracy": uniform}}
    return found | ({} if final is None else {"final": {"row": {"labels": last, "accuracy": final}}})


def pixels(figure: Figure) -> Any:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).astype(int)[:, :, :3]


CASES = {
    "a last training on the teacher's line": ([0.637, 0.938, 0.97, 0.98], 0.988, 0.975, 0.988),
    "a uniform choice below": ([0.637, 0.92, 0.965], 0.995, 0.938, None),
    "better than the teacher": ([0.5, 0.9, 0.91], 0.9, 0.9, None),
    "a fall": ([0.9, 0.6, 0.3], 0.95, 0.31, 0.3),
    "one student": ([0.7], 0.7, None, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers_cover_nothing(case: tuple[list[float], float, float | None, float | None]) -> None:
    with mpl.rc_context(STYLE):
        figure = _accuracy(results(*case))
        (ax,) = figure.axes
        notes = [text for text in ax.texts if text.get_text()]
        assert len(notes) == len(case[0]) + (case[3] is not None)
        alone = []
        for shown in ([], *([note] for note in notes), notes):
            for note in notes:
                note.set_visible(note in shown)
            alone.append(pixels(figure))
    bare, *each, _ = alone
    written = [(np.abs(picture - bare) > 8).any(axis=2) for picture in each]
    for note, there in zip(notes, written, strict=True):
        assert there.sum() > 20, note
        assert bare[there].min() >= LIGHT, f"{note.get_text()} covers something"
    assert sum(there.astype(int) for there in written).max() == 1, "two numbers cover each other"
