"""The report of study 8: tables, comparisons within the seed with their corrections and power, and a plot against bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import NullLocator

from benchmarks.science.noninferiority import POWER, benjamini_hochberg, least_lead
from benchmarks.science.report import by_setting, known, save, table, write_markdown, write_parquet
from benchmarks.science.statistics import LEAST_SEEDS, LEVEL, holm, interval, paired_p
from benchmarks.science.study8 import METHODS, NAMES

BITS = "bits_per_byte"
FIGURES = {BITS: ("bits per byte", 3), "kl": ("KL to the teacher, nats", 3), "agreement": ("same first token, %", 1)}


class Comparison(NamedTuple):
    """A method beside another in a setting: the differences of bits per byte over the seeds, negative where it is better."""

    question: str
    text: str
    method: str
    other: str
    differences: npt.NDArray[np.float64]


def write_report(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write study8.parquet, study8.md and the plot."""
    frame = pd.DataFrame(rows)
    write_parquet(out / "study8.parquet", frame)
    parts = []
    for text, here in frame.groupby("text", sort=False):
        tokens, teacher = here["tokens"].mean(), here["teacher_bits_per_byte"].mean()
        parts += [
            f"## {text}",
            f"{here['seed'].nunique()} seeds, {tokens:,.0f} tokens with a label in the mean; the teacher has {teacher:.3f} "
            "bits per byte of held-out text. ± is half the 95 % t-interval over the seeds, each of which has its own text and student; "
            "differences within the seed are in the next tables. Bytes are those of the labels' Parquet files, blocks "
            "included.",
            figures_table(here),
        ]
    parts += compared(frame)
    draw(out / "study8-bytes.png", frame)
    parts.append("![bits per byte against bytes a token](study8-bytes.png)")
    write_markdown(out / "study8.md", "Study 8: labels of tokens", parts)


def figures_table(frame: pd.DataFrame) -> str:
    """Show what each method has."""
    lines = []
    most = frame["seed"].nunique()
    for method in (name for name in NAMES if name in set(frame["method"])):
        here = frame[frame["method"] == method]
        line = [method + ("" if len(here) == most else f" ({len(here)})")]
        sizes = here[["bytes_a_token", "classes_a_token"]].mean()
        line += ["", ""] if method == "plain" else [f"{value:.1f}" for value in sizes]
        for value, (_, digits) in FIGURES.items():
            found, scale = interval(here[value].to_numpy()), 100 if value == "agreement" else 1
            half = f" ± {scale * found.half:.{digits}f}" if np.isfinite(found.half) else ""
            line.append(f"{scale * found.mean:.{digits}f}{half}")
        lines.append(line)
    return table(["method", "bytes a token", "classes a token", *(name for name, _ in FIGURES.values())], lines)


def questions(frame: pd.DataFrame) -> Iterator[Comparison]:
    """List the comparisons of every text: each with plain training, and pairs that differ in one thing."""
    for text, results in by_setting(frame, ("text",), "method", BITS).items():
        sizes = frame[frame["text"] == text].groupby("method")["bytes_a_token"].mean()
        pairs = [("learned labels minus plain training", name, "plain") for name in NAMES[1:]]
        pairs += [("half hard minus soft alone", f"{name}, half hard", name) for name in NAMES]
        pairs += [("another share minus soft alone", name, name.split(",")[0]) for name in NAMES if "quarter" in name]
        pairs += [
            ("divergence minus KL", name, name.split(",")[0])
            for name, method in METHODS.items()
            if "," in name and "objective" in method.training and "hard" not in name
        ]
        pairs += [("draws minus top-k of the nearest bytes", *pair) for pair in _equal_bytes(sizes)]
        pairs += [("draws minus all classes", f"{k} draws", "all") for k in (12, 25, 50)]
        pairs += [("top-k minus all classes", f"top {k}", "all") for k in (8, 20, 64)]
        for question, method, other in pairs:
            if method in results and other in results:
                differences = known(results[method] - results[other])
                if len(differences) >= LEAST_SEEDS:
                    yield Comparison(question, text, method, other, differences)


def _equal_bytes(sizes: pd.Series) -> Iterator[tuple[str, str]]:
    """Pair draws with the top-k labels whose bytes are nearest: both soft alone, both half hard, and each default with the other."""
    for of_draws, ending in (("", ""), (", half hard", ", half hard"), ("", ", half hard")):
        tops = [name for name in (f"top {k}{ending}" for k in (8, 20, 64)) if name in sizes]
        for name in (f"{k} draws{of_draws}" for k in (12, 25, 50)):
            if tops and name in sizes:
                yield name, min(tops, key=lambda top: abs(np.log(sizes[top] / sizes[name])))


def compared(frame: pd.DataFrame) -> list[str]:
    """Answer the questions, corrected over all of them."""
    found = list(questions(frame))
    if not found:
        return []
    p = [paired_p(one.differences) for one in found]
    by_holm, by_rate = holm(p), benjamini_hochberg(p)
    deviation = float(np.median([one.differences.std(ddof=1) for one in found]))
    seeds = int(np.median([len(one.differences) for one in found]))
    one_alone, first_of_all = (least_lead(deviation, seeds, number) for number in (1, len(found)))
    parts = [
        "## Compared within the seed",
        f"Differences in bits per byte, ± half the {100 * (1 - LEVEL):g} % t-interval over the seeds, negative where the first is "
        f"better. Over all {len(found)} comparisons of this page together: ** where Holm's correction keeps the error of the family at "
        f"{100 * LEVEL:g} %, * where Benjamini and Hochberg's expects {100 * LEVEL:g} % of those marked to be false. Power: over {seeds} "
        f"seeds the median deviation of a difference is {deviation:.4f}, so that one comparison alone finds a difference of "
        f"{one_alone:.3f} with {100 * POWER:.0f} % probability, and Holm's first step one of {first_of_all:.3f}.",
    ]
    for question in dict.fromkeys(one.question for one in found):
        lines = []
        for one, strict, loose in zip(found, by_holm, by_rate, strict=True):
            if one.question == question:
                difference = interval(one.differences)
                mark = "**" if strict else "*" if loose else ""
                shown = f"{difference.mean:+.3f} ± {difference.half:.3f} {mark}".strip()
                lines.append([one.text, one.method, one.other, shown, str(difference.count)])
        parts += [f"### {question}", table(["text", "method", "minus", "bits per byte", "seeds"], lines)]
    return parts


def draw(path: Path, frame: pd.DataFrame) -> None:
    """Draw the difference from plain training against bytes a token, a panel per text."""
    groups = list(frame.groupby("text", sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.4), squeeze=False)
    series = {
        "draws": [f"{k} draws" for k in (12, 25, 50)],
        "draws, quarter hard": ["25 draws, quarter hard"],
        "draws, half hard": [f"{k} draws, half hard" for k in (12, 25, 50)],
        "top-k with tail": [*(f"top {k}" for k in (8, 20, 64)), "all"],
        "top-k with tail, quarter hard": ["top 20, quarter hard"],
        "top-k with tail, half hard": [*(f"top {k}, half hard" for k in (8, 20, 64)), "all, half hard"],
        "top 20, truncated": ["top 20, truncated"],
    }
    for axis, (text, here) in zip(axes[0], groups, strict=True):
        table_of = here.pivot_table(index="seed", columns="method", values=BITS)
        sizes = here.groupby("method")["bytes_a_token"].mean()
        for number, (name, methods) in enumerate(series.items()):
            there = [method for method in methods if method in table_of and "plain" in table_of]
            if not there:
                continue
            found = [interval(known((table_of[method] - table_of["plain"]).to_numpy(float))) for method in there]
            bars = [one.half if np.isfinite(one.half) else 0.0 for one in found]
            x = [sizes[method] * 1.015**number for method in there]
            style: dict[str, Any] = {"color": f"C{number}", "marker": "oPsDXv^"[number], "ms": 4, "lw": 1, "capsize": 2}
            axis.errorbar(x, [one.mean for one in found], bars, label=name, **style)
        axis.axhline(0, color="grey", lw=0.7)
        axis.set(xscale="log", xlabel="bytes a token", title=str(text))
        least, most = axis.get_xlim()
        ticks = (20, 50, 100, 300, 1000) if most > 10 * least else (20, 30, 40, 50, 60, 80)
        axis.set_xticks([tick for tick in ticks if least <= tick <= most])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("bits per byte minus plain training")
    keys = {key: handle for axis in axes[0] for handle, key in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0, -1].legend(keys.values(), keys, fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
