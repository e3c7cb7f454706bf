"""The exports of a student: each made once, judged, and put in one table with the student itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from distilbeam.extras import require_extras
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.needs import needs_of_formats
from distilbeam.pipelines.report.cards import write_card
from distilbeam.progress import Progress
from distilbeam.storage.files import read_json, sweep, write_json
from distilbeam.storage.stores import store_of
from distilbeam.student.checkpoint import Student, load_student
from distilbeam.student.export.export import FORMATS, card_of, export_student
from distilbeam.student.export.prune import prune_student, require_prunable
from distilbeam.student.networks.config import StudentConfig

PRUNED, CUT = "pruned", "pruned-untrained"
ALL_FORMATS = (*FORMATS, PRUNED)

Judge = Callable[[Path], dict[str, Any]]
Retrain = Callable[[StudentConfig, Path, Path, Progress], object]


def check_formats(formats: Sequence[str]) -> None:
    """Refuse a format that there is not, or whose packages are not installed."""
    for name in formats:
        if name not in ALL_FORMATS:
            raise ValueError(f"--format must be one of {', '.join(ALL_FORMATS)}, got {name}")
    require_extras(needs_of_formats(formats, PRUNED))


def write_exports(
    student: Path,
    formats: Sequence[str],
    output: Path,
    judge: Judge,
    display: Display,
    examples: npt.NDArray[Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    retrain: Retrain | None = None,
    ratio: float = 0.5,
    facts: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Export a student in several formats and judge each beside it; what is there already is judged again.

    Args:
      student: directory of the student.
      formats: names out of `ALL_FORMATS`.
      output: directory that gets one directory per format, and `metrics.json` with the table.
      judge: gives the figures of a student's or export's directory.
      display: shows the steps.
      examples: inputs out of the pool to calibrate on.
      origin: where the examples come from.
      provenance: what the student was made from.
      retrain: trains a pruned network: its configuration, the directory to start from, the directory to write, progress.
      ratio: share of the channels that `pruned` takes away.
      facts: what the model cards say besides of data, teacher and labels.

    Returns:
      The rows of the table: the student, then every export in `output`, also those of earlier calls.

    Raises:
      ValueError: an unknown format, missing examples, or a directory in the way that holds another student's export.
    """
    check_formats(formats)
    loaded = load_student(student)
    fingerprint = loaded.fingerprint()
    if PRUNED in formats:
        _require_pruning(loaded, ratio, retrain)
    with store_of(output).hold(output, "--output", "--output"):
        sweep(output)  # what was left by one that was killed
        table = _exported(
            student, fingerprint, formats, output, judge, display, examples, origin, provenance, retrain, ratio
        )
        for row in table[1:]:
            _write_card(loaded, output / row["name"], row, provenance, facts)
        return table


def _write_card(
    student: Student,
    directory: Path,
    row: Mapping[str, Any],
    provenance: Mapping[str, Any] | None,
    facts: Mapping[str, Any] | None,
) -> None:
    """Put the figures of an export, or of a pruned student, into its model card."""
    if row["name"] == PRUNED:
        card = card_of(load_student(directory), provenance=provenance)
    else:
        card = card_of(student, read_json(directory / "export.json"), provenance)
    figures = {name: row[name] for name in ("validation", "test", "data") if name in row}
    card = replace(card, facts={**card.facts, **(facts or {})}, figures=figures)
    if "classes" in row:
        card = replace(card, per_class=row["classes"], on=f"the {row['classes_on']} set")
    write_card(directory, card)


def _exported(
    student: Path,
    fingerprint: str,
    formats: Sequence[str],
    output: Path,
    judge: Judge,
    display: Display,
    examples: npt.NDArray[Any] | None,
    origin: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
    retrain: Retrain | None,
    ratio: float,
) -> list[dict[str, Any]]:
    for name in formats:
        directory = output / name
        with display.step(f"export {name}") as progress:
            if directory.exists() or (name == PRUNED and (output / CUT).exists()):
                _require_same(output, name, fingerprint, ratio)
            if name == PRUNED:
                _write_pruned(student, output, ratio, retrain, progress)
            elif not directory.exists():
                export_student(student, name, directory, examples, origin, provenance)
    rows = [("student", student), *((name, output / name) for name in ALL_FORMATS if (output / name).exists())]
    results = output / "results.json"
    table = []
    for name, directory in rows:
        with display.step(f"judge {name}"):
            table.append({"name": name, **judge(directory)})
    write_json(results, {"student": str(student), "fingerprint": fingerprint, "rows": table})
    return table


def _require_pruning(student: Student, ratio: float, retrain: Retrain | None) -> None:
    """Refuse what pruning would, before other formats take their time."""
    if retrain is None:
        raise ValueError(
            "a pruned student must be trained again: name the run's configuration instead of the student's directory"
        )
    if not 0 < ratio < 1:
        raise ValueError(f"--ratio must be a share of the channels between 0 and 1, got {ratio}")
    require_prunable(student.module)


def _write_pruned(student: Path, output: Path, ratio: float, retrain: Retrain | None, progress: Progress) -> None:
    assert retrain is not None  # `_require_pruning` refuses
    cut = output / CUT
    if not cut.exists():
        prune_student(student, ratio, cut)
    retrain(load_student(cut).config, cut, output / PRUNED, progress)


def _require_same(output: Path, name: str, fingerprint: str, ratio: float) -> None:
    """Check that what is there already was made from this student."""
    if name == PRUNED:
        former = load_student(output / CUT).extra["pruned"]
        same = former == {"from": fingerprint, "ratio": ratio}
    else:
        same = read_json(output / name / "export.json")["student"]["fingerprint"] == fingerprint
    if not same:
        raise ValueError(
            f"{output} holds another student, or one of another --ratio, in the format {name}; remove it, or choose "
            "another --output"
        )
