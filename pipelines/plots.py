"""The plots of a report, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEACHER, STUDENT, UNIFORM, GREY = "#1b4965", "#d1495b", "#8d99ae", "#cfd4da"
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff1",
    "axes.axisbelow": True,
}


def draw_plots(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw every plot that a run's results allow.

    Args:
      results: the contents of `metrics.json`.
      directory: where to write the PNG files.

    Returns:
      Their paths.
    """
    drawings = {"accuracy.png": _accuracy, "footprint.png": _footprint}
    if any("edges" in entry for entry in results["rounds"]):
        drawings["bought.png"] = _bought
    paths = []
    with mpl.rc_context(_STYLE):
        for name, draw in drawings.items():
            figure = draw(results)
            paths.append(directory / name)
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def _accuracy(results: dict[str, Any]) -> Figure:
    figure, ax = _figure(6.4, 4)
    students = results["students"]
    labels, accuracy = [s["labels"] for s in students], [100 * s["accuracy"] for s in students]
    ax.plot(labels, accuracy, "o-", color=STUDENT, lw=2, label="student")
    ax.axhline(100 * results["teacher"]["accuracy"], color=TEACHER, lw=1.5, ls="--", label="teacher")
    if "uniform" in results:
        ax.plot(
            results["uniform"]["labels"],
            100 * results["uniform"]["accuracy"],
            "s",
            color=UNIFORM,
            ms=8,
            label="same student, uniform choice",
        )
    for x, y in zip(labels, accuracy, strict=True):
        ax.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, -14), ha="center", color=STUDENT)
    ax.set(xlabel="labels bought from the teacher", ylabel=f"accuracy on the {results['evaluated_on']} set (%)")
    ax.margins(y=0.15)
    ax.legend(frameon=False, loc="lower right")
    return figure


def _bought(results: dict[str, Any]) -> Figure:
    rounds = [(i, entry) for i, entry in enumerate(results["rounds"]) if "edges" in entry][-3:]
    figure = Figure(figsize=(4.2 * len(rounds), 3.8))
    axes = figure.subplots(1, len(rounds), squeeze=False)[0]
    for ax, (number, entry) in zip(axes, rounds, strict=True):
        _bought_in_round(ax, entry)
        ax.set_title(f"round {number + 1}", loc="left")
    axes[0].set_ylabel("share of examples (%)")
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3)
    return figure


def _bought_in_round(ax: Axes, entry: dict[str, Any]) -> None:
    edges = np.array(entry["edges"])
    for name, color, alpha in (("pool", GREY, 1.0), ("bought", STUDENT, 0.75)):
        counts = np.array(entry[name])
        ax.bar(
            edges[:-1],
            100 * counts / max(counts.sum(), 1),
            np.diff(edges),
            align="edge",
            color=color,
            alpha=alpha,
            label=name,
        )
    ax.set_xlabel("gain (how much the student would learn)")
    centres, right, low, high = _teacher_right(edges, entry["validation"])
    twin = ax.twinx()
    twin.errorbar(
        centres, 100 * right, 100 * np.array([right - low, high - right]), fmt="o-", color=TEACHER, ms=4, capsize=2
    )
    twin.set_ylim(0, 105)
    twin.grid(visible=False)
    twin.set_ylabel("teacher right on validation (%)", color=TEACHER)
    ax.plot([], [], "o-", color=TEACHER, label="teacher right (95 % interval)")


def _teacher_right(
    edges: np.ndarray, validation: dict[str, list[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pool the gain bins to quarters of the range and return centres, share right and its Wilson interval."""
    count, right = (np.array(validation[name]).reshape(4, -1).sum(axis=1) for name in ("count", "right"))
    centres = edges.reshape(-1)[:-1].reshape(4, -1).mean(axis=1) + (edges[1] - edges[0]) / 2
    keep = count > 0
    n, p, z = count[keep], right[keep] / count[keep], 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return centres[keep], p, np.minimum(middle - half, p), np.maximum(middle + half, p)


def _footprint(results: dict[str, Any]) -> Figure:
    rows = [
        (results["teacher"], TEACHER, "teacher"),
        (results["students"][0], UNIFORM, "student before"),
        (results["students"][-1], STUDENT, "student after"),
    ]
    figure = Figure(figsize=(9.6, 3.8))
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, key, label in (
        (left, "size_bytes", "size (KB)"),
        (right, "latency_ms_batch1", "latency, one example (ms)"),
    ):
        for row, color, name in rows:
            if row.get(key) is not None:
                x = row[key] / 1024 if key == "size_bytes" else row[key]
                ax.plot(x, 100 * row["accuracy"], "o", ms=9, color=color, label=name)
        ax.set_xscale("log")
        ax.set_xlabel(label)
        ax.margins(0.25)
    left.set_ylabel(f"accuracy on the {results['evaluated_on']} set (%)")
    right.legend(frameon=False, loc="lower right")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()
