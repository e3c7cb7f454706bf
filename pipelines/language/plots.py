"""The plots of a report on a language model, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from distilbeam.pipelines.report.plots import GREY, STUDENT, STYLE, TEACHER, UNIFORM, legend_below

PLAIN = "#2a9d8f"
_LAST = 3  # rounds that are drawn


def draw_plots(results: dict[str, Any], directory: Path) -> list[Path]:
    """Draw every plot that a run's figures allow.

    Args:
      results: the contents of `metrics.json`.
      directory: where to write the PNG files.

    Returns:
      Their paths.
    """
    drawings = {"quality.png": _quality}
    if any("edges" in entry for entry in results["rounds"]):
        drawings["chosen.png"] = _chosen
    paths = []
    with mpl.rc_context(STYLE):
        for name, draw in drawings.items():
            paths.append(directory / name)
            draw(results).savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def _quality(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, key, label in ((axes[0], "bits_per_byte", "bits per byte"), (axes[1], "kl", "KL to the teacher (nats)")):
        teacher = results["teacher"].get(key)
        if teacher is not None:
            ax.axhline(teacher, color=TEACHER, lw=1.5, ls="--", label="teacher")
        students = [row for row in results["students"] if row.get(key) is not None]
        students = [row for row in students if row["labels"] or len(students) == 1] or students
        ax.plot([r["labels"] for r in students], [r[key] for r in students], "o-", color=STUDENT, lw=2, label="student")
        for name, marker, color, said in (
            ("uniform", "s", UNIFORM, "the same student, uniform choice"),
            ("plain", "D", PLAIN, "the same student, text alone"),
        ):
            if name in results and key in results[name]:
                ax.plot(results[name]["labels"], results[name][key], marker, color=color, ms=7, label=said)
        ax.set(xlabel="tokens that the teacher labelled", ylabel=f"{label}, {results['evaluated_on']} blocks")
        ax.margins(x=0.12, y=0.15)
    legend_below(figure, axes[0], columns=4)
    return figure


def _chosen(results: dict[str, Any]) -> Figure:
    rounds = [(i, entry) for i, entry in enumerate(results["rounds"]) if "edges" in entry][-_LAST:]
    figure = Figure(figsize=(3.6 * len(rounds) + 0.6, 3.4), layout="constrained")
    axes = figure.subplots(1, len(rounds), squeeze=False, sharey=True)[0]
    for ax, (number, entry) in zip(axes, rounds, strict=True):
        edges = np.array(entry["edges"])
        for name, color, alpha in (("pool", GREY, 1.0), ("bought", STUDENT, 0.75)):
            counts = np.array(entry[name])
            shares = 100 * counts / max(counts.sum(), 1)
            ax.bar(edges[:-1], shares, np.diff(edges), align="edge", color=color, alpha=alpha, label=name)
        ax.set_title(f"round {number + 1}", loc="left")
        ax.set_xlabel("gain of a block")
    axes[0].set_ylabel("share of blocks (%)")
    legend_below(figure, axes[-1])
    return figure
