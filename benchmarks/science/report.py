"""Tables, plots and Parquet files of the studies, each with the machine, the versions and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.science.cells import about_machine
from benchmarks.science.statistics import Interval, interval

mpl.use("Agg")
import matplotlib.pyplot as plt

Results = dict[str, dict[str, npt.NDArray[np.float64]]]
MARKERS = "osD^v<>"  # seven, so that twenty colours times these are told apart


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write rows with the machine in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    about = json.dumps(about_machine()).encode()
    pq.write_table(table.replace_schema_metadata({b"machine": about}), path, compression="zstd")


def write_markdown(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page: title, machine and command, then the parts."""
    about = about_machine()
    versions = ", ".join(f"{name} {number}" for name, number in about["packages"].items())
    head = [
        f"# {title}",
        f"`{about['command']}`, {about['date']}. {about['cpu']}, {about['cores']} cores of which one was used; "
        f"Python {about['python']}, {versions}.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*head, *parts]) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table, the first column to the left, the others to the right."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def points(found: Interval) -> str:
    """Show an accuracy in percent with half its interval."""
    half = "" if not np.isfinite(found.half) else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:.1f}{half}"


def signed(found: Interval | None) -> str:
    """Show a difference in points, in bold where its interval leaves 0 out."""
    if found is None or not np.isfinite(found.half):
        return "" if found is None else f"{100 * found.mean:+.1f}"
    text = f"{100 * found.mean:+.1f} ± {100 * found.half:.1f}"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def by_setting(frame: pd.DataFrame, setting: Sequence[str], method: str, value: str = "accuracy") -> Results:
    """Arrange figures: for each setting and method an array over the seeds, NaN where one is missing."""
    seeds = sorted(frame["seed"].unique())
    results: Results = {}
    for names, group in frame.groupby(list(setting), sort=False):
        pivot = group.pivot_table(index="seed", columns=method, values=value, aggfunc="mean").reindex(seeds)
        results[" / ".join(map(str, names))] = {str(name): pivot[name].to_numpy(float) for name in pivot}
    return results


def known(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Leave out the seeds that are missing."""
    return values[np.isfinite(values)]


def accuracy_table(results: Results, methods: Sequence[str], shown: Callable[[str], str] = str) -> str:
    """Show the mean accuracy and its interval of every method (rows) in every setting (columns).

    Where a method has fewer seeds than another in the table, their number follows in brackets.
    """
    settings = [name for name in results if any(method in results[name] for method in methods)]
    found = {
        method: [known(results[s][method]) if method in results[s] else np.zeros(0) for s in settings]
        for method in methods
    }
    most = max((len(cell) for cells in found.values() for cell in cells), default=0)

    def show(cell: npt.NDArray[np.float64]) -> str:
        return (points(interval(cell)) + ("" if len(cell) == most else f" ({len(cell)})")) if len(cell) else ""

    rows = [[method, *map(show, cells)] for method, cells in found.items() if any(map(len, cells))]
    return table(["method", *map(shown, settings)], rows)


def curves(path: Path, frame: pd.DataFrame, methods: Sequence[str], panels: Sequence[str], title: str) -> None:
    """Draw accuracy against budget, a panel per teacher, with 95 % t-intervals."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.1), sharey=False, squeeze=False)
    for axis, teacher in zip(axes[0], panels, strict=True):
        here = frame[frame["teacher"] == teacher]
        for index, method in enumerate(methods):
            groups = here[here["method"] == method].groupby("budget")["accuracy"]
            found = [(100 * share, interval(values.to_numpy())) for share, values in groups]
            if found:
                x = np.array([share for share, _ in found])
                bars = [100 * i.half if np.isfinite(i.half) else 0.0 for _, i in found]
                style: dict[str, Any] = {
                    "color": plt.get_cmap("tab20")(index % 20),
                    "marker": MARKERS[index % len(MARKERS)],
                }
                if method == "oracle":
                    style = {"color": "black", "ls": "--"}
                means = [100 * i.mean for _, i in found]
                axis.errorbar(x * 1.012**index, means, bars, lw=1, ms=3, capsize=1.5, label=method, **style)
        error = 100 * here["teacher_accuracy"].mean()
        axis.set(xscale="log", xlabel="labels bought, % of the pool")
        axis.set_title(f"{teacher}\n(teacher {error:.0f} %)", fontsize=8)
        ticks = sorted({round(100 * share, 1) for share in here["budget"]})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("student's test accuracy, %")
    figure.suptitle(title, fontsize=9, y=1.08)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=7, frameon=False)
    save(figure, path)


def differences(path: Path, rows: dict[str, dict[str, Interval]], title: str, label: str) -> None:
    """Draw differences with their intervals: a group of dots per row, one dot per series, from above as in the legend."""
    series = list(dict.fromkeys(name for found in rows.values() for name in found))
    colours, room = plt.get_cmap("tab10" if len(series) <= 10 else "tab20"), max(0.32, 0.055 * len(series))
    figure, axis = plt.subplots(figsize=(6.5, 0.8 + room * len(rows)))
    for index, name in enumerate(series):
        places = [(place, found[name]) for place, found in enumerate(rows.values()) if name in found]
        step = min(0.12, 0.8 / len(series))  # no dot among those of the next row
        y = [-place - step * (index - (len(series) - 1) / 2) for place, _ in places]
        bars = [100 * i.half if np.isfinite(i.half) else 0.0 for _, i in places]
        style: dict[str, Any] = {"color": colours(index), "ms": 3, "lw": 1, "capsize": 1.5}
        axis.errorbar([100 * i.mean for _, i in places], y, xerr=bars, fmt="o", label=name, **style)
    for place in range(1, len(rows)):
        axis.axhline(0.5 - place, color="0.9", lw=0.5, zorder=0)
    axis.set_ylim(0.5 - len(rows), 0.5)
    axis.axvline(0, color="grey", lw=0.7)
    axis.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=8)
    axis.set_xlabel(label, fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
