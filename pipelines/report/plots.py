"""The plots of a report, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from distilbeam.pipelines.report.point_labels import label_points

TEACHER, STUDENT, FINAL, UNIFORM, GREY = "#1b4965", "#d1495b", "#7b2d3a", "#8d99ae", "#cfd4da"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceff1",
    "axes.axisbelow": True,
}

_Floats = npt.NDArray[np.float64]


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
    with mpl.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw(results)
            paths.append(directory / name)
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def draw_pareto(results: dict[str, Any], directory: Path) -> Path:
    """Draw a sweep's students, accuracy against cost, with the front.

    Args:
      results: the contents of `pareto.json`.
      directory: where to write `pareto.png`.

    Returns:
      Its path.
    """
    with mpl.rc_context(STYLE):
        figure = _pareto(results)
        figure.savefig(directory / "pareto.png", dpi=150, bbox_inches="tight")
    return directory / "pareto.png"


def _pareto(results: dict[str, Any]) -> Figure:
    figure, ax = _figure(7.6, 4.6)
    cost, label, scale = _COSTS[results["cost"]]
    if results["teacher"] is not None:
        ax.axhline(100 * results["teacher"], color=TEACHER, lw=1.2, ls="--", label="teacher")
    chosen = sorted((p[cost] * scale, 100 * p["accuracy"]) for p in results["points"] if p["on_front"])
    ax.plot(*zip(*chosen, strict=True), drawstyle="steps-post", color="#22303c", lw=1, alpha=0.6, label="front")
    for (strategy, form), points in _grouped(results["points"]).items():
        color, name = _STRATEGIES[strategy]
        x, y = [p[cost] * scale for p in points], [100 * p["accuracy"] for p in points]
        ax.plot(x, y, _FORMS[form], ms=7, color=color, mec="white", mew=0.6, label=f"{name}, {form}")
    ax.set(xlabel=label, ylabel="accuracy on the validation set (%)")
    ax.margins(0.08, 0.12)
    _plain_log(ax)
    _end_at_100(ax)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _grouped(points: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["strategy"], point["form"]), []).append(point)
    return groups


_COSTS = {
    "size_bytes": ("size_bytes", "size (KB)", 1 / 1024),
    "latency_ms_batch1": ("latency_ms_batch1", "latency of one example (ms)", 1.0),
    "latency_ms_batch64": ("latency_ms_batch64", "latency of 64 examples (ms)", 1.0),
}
_STRATEGIES = {
    "shrink": (UNIFORM, "shrunk alone"),
    "shrink-and-improve": (STUDENT, "shrink and improve"),
    "grow-improve-and-shrink": ("#2a9d8f", "grow, improve, shrink"),
}
_FORMS = {"float32": "o", "int8": "s", "int8-weights": "D"}


def _accuracy(results: dict[str, Any]) -> Figure:
    figure, ax = _figure(6.4, 4)
    students = results["students"]
    labels, accuracy = [s["labels"] for s in students], [100 * s["accuracy"] for s in students]
    ax.axhline(100 * results["teacher"]["accuracy"], color=TEACHER, lw=1.5, ls="--", label="teacher")
    ax.plot(labels, accuracy, "o-", color=STUDENT, lw=2, label="student")
    if "uniform" in results:
        point = results["uniform"]["labels"], 100 * results["uniform"]["accuracy"]
        ax.plot(*point, "s", color=UNIFORM, ms=7, label="the same student, uniform choice")
    points = [(x, y, f"{y:.1f}", STUDENT) for x, y in zip(labels, accuracy, strict=True)]
    if (final := _final(results)) is not None:
        x, y = final["labels"], 100 * final["accuracy"]
        ax.plot(x, y, "*", color=FINAL, ms=11, label="student after the last training")
        points.append((x, y, f"{y:.1f}", FINAL))
    ax.set(xlabel="labels bought from the teacher", ylabel=f"accuracy on the {results['evaluated_on']} set (%)")
    ax.margins(x=0.12, y=0.15)
    _end_at_100(ax)
    legend_below(figure, ax, columns=2)
    label_points(ax, points)
    return figure


def _bought(results: dict[str, Any]) -> Figure:
    rounds = [(i, entry) for i, entry in enumerate(results["rounds"]) if "edges" in entry][-3:]
    figure = Figure(figsize=(3.6 * len(rounds) + 0.6, 5.2), layout="constrained")
    axes = figure.subplots(2, len(rounds), squeeze=False, sharex="col", sharey="row", height_ratios=(2, 3))
    for (right, shares), (number, entry) in zip(axes.T, rounds, strict=True):
        edges = np.array(entry["edges"])
        _draw_right(right, edges, entry["validation"])
        _draw_shares(shares, edges, entry)
        right.set_title(f"round {number + 1}", loc="left")
    axes[0, 0].set_ylabel("teacher right on\nvalidation (%)")
    axes[1, 0].set_ylabel("share of examples (%)")
    legend_below(figure, axes[1, -1])
    return figure


def _draw_right(ax: Axes, edges: _Floats, validation: dict[str, list[int]]) -> None:
    """Pool the bins of the gain to quarters of its range; draw the share right and its 95 % Wilson interval."""
    count, right = (np.array(validation[name]).reshape(4, -1).sum(axis=1) for name in ("count", "right"))
    centres = edges[:-1].reshape(4, -1).mean(axis=1) + (edges[1] - edges[0]) / 2
    some = count > 0
    n, share, z = count[some], right[some] / count[some], 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    bars = np.clip([share - (middle - half), middle + half - share], 0, None)
    ax.errorbar(centres[some], 100 * share, 100 * bars, fmt="o-", color=TEACHER, ms=4, capsize=2)
    ax.set_ylim(0, 105)


def _draw_shares(ax: Axes, edges: _Floats, entry: dict[str, Any]) -> None:
    for name, color, alpha in (("pool", GREY, 1.0), ("bought", STUDENT, 0.75)):
        counts = np.array(entry[name])
        shares = 100 * counts / max(counts.sum(), 1)
        ax.bar(edges[:-1], shares, np.diff(edges), align="edge", color=color, alpha=alpha, label=name)
    ax.set_xlabel("gain")


def _footprint(results: dict[str, Any]) -> Figure:
    rows = [(results["teacher"], TEACHER, "teacher")]
    if results["students"][0]["labels"] == 0:
        rows.append((results["students"][0], UNIFORM, "student before"))
    if "own" in results:
        rows.append((results["own"], UNIFORM, "the run's own student"))
    rows.append((results["students"][-1], STUDENT, "student after"))
    if (final := _final(results)) is not None:
        rows.append((final, FINAL, "after the last training"))
    figure = Figure(figsize=(9.6, 4.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, key, label in (
        (left, "size_bytes", "size (KB)"),
        (right, "latency_ms_batch1", "latency, one example (ms)"),
    ):
        for row, color, name in rows:
            if row.get(key) is not None:
                x = row[key] / 1024 if key == "size_bytes" else row[key]
                marker = "*" if color == FINAL else "o"
                ax.plot(x, 100 * row["accuracy"], marker, ms=12 if color == FINAL else 9, color=color, label=name)
        ax.set_xlabel(label)
        ax.margins(0.25)
        _plain_log(ax)
    _end_at_100(left)
    left.set_ylabel(f"accuracy on the {results['evaluated_on']} set (%)")
    legend_below(figure, right)
    return figure


def _final(results: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of the student of the last training, where there was one."""
    row: dict[str, Any] | None = results.get("final", {}).get("row")
    return row


def _plain_log(ax: Axes) -> None:
    """Make the x axis logarithmic, with 1, 2 and 5 of each power of ten as plain numbers; a narrow range has all its digits."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 4 * low else tuple(range(1, 10))))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def _end_at_100(ax: Axes) -> None:
    """Leave room above 100 % for markers, but no number: there is no such accuracy."""
    low, high = ax.get_ylim()
    ax.set_ylim(low, min(high, 104))
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= 100])


def legend_below(figure: Figure, ax: Axes, columns: int = 5) -> None:
    """Put the legend below the axes, where it covers no point."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
