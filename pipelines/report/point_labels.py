"""Numbers beside the points of a plot, each where it covers no point, no line and no other number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_SIDES = (
    (-1, 1),
    (0, 1),
    (1, -1),
    (0, -1),
    (-1, -1),
    (1, 1),
    (-1, 0),
    (1, 0),
)  # of the point, those of a rising curve first
_DISTANCES = (7, 14, 24)  # points of type
_APART = 2.0  # pixels that a line is looked at in, and that are kept free around a number
_OUTSIDE = 10_000

Point = tuple[float, float, str, str]


def label_points(ax: Axes, points: Sequence[Point]) -> list[Annotation]:
    """Write a text beside each point; call it when all else is drawn.

    Args:
      ax: the axes, with its lines and its limits.
      points: x and y in data coordinates, the text, and its colour.

    Returns:
      The texts.
    """
    figure = ax.get_figure()
    assert figure is not None
    canvas = FigureCanvasAgg(figure)  # type: ignore[arg-type]
    canvas.draw()  # the layout decides where the axes are
    taken = np.concatenate([_covered(ax), np.empty((0, 2))])
    placed: list[Bbox] = []
    made = []
    for x, y, text, color in points:
        note = ax.annotate(text, (x, y), textcoords="offset points", xytext=(0, 0), color=color)
        note.set_in_layout(False)
        best = None
        for distance in _DISTANCES:
            for across, up in _SIDES:
                _put(note, across, up, distance)
                box = note.get_window_extent(canvas.get_renderer()).padded(_APART)
                cost = _cost(box, taken, placed, ax)
                if best is None or cost < best[0]:
                    best = cost, across, up, distance, box
            if best is not None and not best[0]:
                break
        assert best is not None
        _put(note, *best[1:4])
        placed.append(best[4])
        made.append(note)
    return made


def _put(note: Annotation, across: int, up: int, distance: int) -> None:
    away = distance / (1 if 0 in (across, up) else np.sqrt(2))
    note.xyann = (across * away, up * away)
    note.set(ha=("center", "left", "right")[across], va=("center", "bottom", "top")[up])


def _covered(ax: Axes) -> npt.NDArray[np.float64]:
    """List pixels that the lines and markers of axes cover, close enough to each other that no text fits between."""
    pixels = [np.empty((0, 2))]
    scale = ax.figure.dpi / 72
    for line in ax.lines:
        corners = line.get_transform().transform(line.get_xydata())
        if line.get_linestyle() not in ("None", ""):
            for start, end in pairwise(corners):
                steps = max(2, int(np.hypot(*(end - start)) / _APART))
                pixels.append(np.linspace(start, end, steps))
        if line.get_marker() not in ("None", "", None):
            around = np.linspace(-1, 1, 5) * line.get_markersize() / 2 * scale
            offsets = np.stack(np.meshgrid(around, around), axis=-1).reshape(-1, 2)
            pixels.append((corners[:, None] + offsets).reshape(-1, 2))
    return np.concatenate(pixels)


def _cost(box: Bbox, taken: npt.NDArray[np.float64], placed: Sequence[Bbox], ax: Axes) -> int:
    """Count what a text in a box would cover."""
    inside = (taken >= box.min).all(axis=1) & (taken <= box.max).all(axis=1)
    frame = ax.get_window_extent()
    outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
    return int(inside.sum()) + _OUTSIDE * (outside + sum(box.overlaps(other) for other in placed))
