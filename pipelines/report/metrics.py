"""The figures of a run: the final table's and the plots', collected into `report/metrics.json`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.unusable_rows import read_unusable, unusable_list
from distilbeam.pipelines.engine.model_cache import cached_student, cached_teacher
from distilbeam.pipelines.jobs.cross_fitting import CrossFittedTraining
from distilbeam.pipelines.jobs.final_result import (
    final_directory,
    final_result,
    final_student,
    is_wanted,
    learns_validation,
)
from distilbeam.pipelines.jobs.kept_student import kept_round
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.report.baseline import baseline_row
from distilbeam.pipelines.report.cards import write_cards
from distilbeam.pipelines.report.tables import LATENCIES
from distilbeam.progress import Progress
from distilbeam.selection.gains import gain_named
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.evaluation.metrics import evaluate, footprint, per_class, worst_classes
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.softlabels import read_manifest

Logits = npt.NDArray[np.float32]
_BINS = 20
MAY_BE_PAID = ("tfserving", "beam")  # kinds of teachers of which a call may cost money


def write_results(run: Run, progress: Progress) -> None:
    """Evaluate the teacher and every student and write `report/metrics.json`."""
    where, config = run.directory, run.config
    name = "validation" if config.data.test is None else "test"
    bought = [read_json(where.summary(where.labels(r))) for r in range(config.run.rounds)]
    students = []
    numbers = where.trained(config.run.rounds)
    for done, number in enumerate(numbers, 1):
        title = f"student, round {number}" if number else "student, before"
        labels = sum(b["rows"] for b in bought[:number])
        students.append(_student_row(run, where.student(number), name, title, labels))
        progress.step(done, len(numbers))
    kept, worse = kept_round(run)
    results: dict[str, Any] = {
        "evaluated_on": name,
        "teacher": _teacher_row(run, name),
        "students": students,
        "human_labels": run.inputs.labelled.plan.rows,
        "pool_rows": run.inputs.pool.rows,
        "wrong_share": run.wrong_share,
        "temperature": run.temperature,
        "temperature_note": run.calibration["note"] if config.labels.temperature == "calibrated" else "",
        "rounds": [_round(run, r, summary) for r, summary in enumerate(bought)],
        "calls": _calls(run, bought),
        "unusable": _unusable(run),
        "work": read_json(where.work),
        **_classes(run, final_student(run) or where.student(kept), name, _unseen(run, name)),
        "kept": {"round": kept, "worse": worse},
        "standing": read_json(where.standing) if where.standing.exists() else None,
        "baseline": baseline_row(run, name),
    }
    if config.selection.compare_uniform:
        uniform = run.comparison
        labels = read_json(where.summary(uniform.labels(0)))["rows"]
        results["uniform"] = _student_row(run, uniform.student(1), name, "student, uniform choice", labels)
    if (found := final_result(run)) is not None:
        results["final"] = {"directory": str(final_directory(run).relative_to(where.root)), **found}
        if (student := final_student(run)) is not None:
            unseen = _unseen(run, name)
            title = "student, final" if unseen is None else "student, final, by folds"
            results["final"]["row"] = _student_row(run, student, name, title, sum(b["rows"] for b in bought), unseen)
    if (ran := cached_student(str(final_student(run) or where.student(kept))).extra.get("precision")) is not None:
        results["ran"] = ran
    if (sentence := where.sentence(config.run.rounds)) is not None:
        results["variant"] = sentence
    if (own := where.beside(config.run.rounds)) is not None:
        labels = sum(b["rows"] for b in bought)
        results["own"] = _student_row(run, own, name, "the run's own student", labels)
    write_cards(run, results)
    (where.report / "report.html").unlink(missing_ok=True)  # it shows former figures
    write_json(where.metrics, results)


def _unusable(run: Run) -> dict[str, Any]:
    """Count the rows of the pool that students could not read, and name the lists that have them."""
    where = run.directory
    lists = {r: read_unusable(where.gains(r)) for r in range(run.config.run.rounds)}
    rows = {(row["file"], row["row"]) for found in lists.values() for row in found}
    files = [str(unusable_list(where.gains(r)).relative_to(where.root)) for r, found in lists.items() if found]
    return {"rows": len(rows), "lists": files}


def are_current(run: Run) -> bool:
    """Tell whether the figures on disk are of the rounds and the comparison that the configuration names."""
    if not run.directory.metrics.exists():
        return False
    found, config = read_json(run.directory.metrics), run.config
    directory = str(final_directory(run).relative_to(run.directory.root)) if is_wanted(run) else None
    if found.get("final", {}).get("directory") != directory:
        return False
    return len(found["rounds"]) == config.run.rounds and ("uniform" in found) == config.selection.compare_uniform


def _unseen(run: Run, name: str) -> Logits | None:
    """Give what stands for the final student on rows that it has learned: what students of its kind say that have not."""
    found = final_result(run)
    if found is None or name == "test" or not learns_validation(run):
        return None
    return CrossFittedTraining(run).unseen_logits(found["pseudo_labels"])


def _classes(run: Run, student: Path, name: str, unseen: Logits | None) -> dict[str, Any]:
    """Measure the last student class by class."""
    logits = run.student_logits(student, name) if unseen is None else unseen
    truth, classes = run.truth(name), run.inputs.classes
    return {"classes": per_class(logits, truth, classes), "worst": worst_classes(logits, truth, classes)}


def _student_row(
    run: Run, directory: Path, name: str, title: str, labels: int, unseen: Logits | None = None
) -> dict[str, Any]:
    logits = run.student_logits(directory, name) if unseen is None else unseen
    metrics = evaluate(logits, run.truth(name), run.answers(name))
    return {"name": title, "labels": labels, **metrics, **footprint(cached_student(str(directory)))}


def _teacher_row(run: Run, name: str) -> dict[str, Any]:
    answers = run.answers(name)
    answered = ~np.isnan(answers).any(axis=1)
    metrics = evaluate(answers[answered], run.truth(name)[answered])
    return {"name": "teacher", "unanswered": int((~answered).sum()), **metrics, **_teacher_footprint(run)}


def _teacher_footprint(run: Run) -> dict[str, Any]:
    """Measure a teacher: its files and parameters, and its latency where asking costs nothing; others may be paid by the call."""
    teacher, config = cached_teacher(run.teacher), run.config.teacher
    latency: dict[str, float | None] = dict.fromkeys(LATENCIES)
    if config.kind not in MAY_BE_PAID:
        latency = _teacher_latency(run, teacher)
    models = [getattr(config, name) for name in config.paths() if name in ("model", "weights")]
    paths = [Path(path) for path in (*models, *getattr(config, "files", ())) if path is not None]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return {"parameters": getattr(teacher, "num_parameters", None), "size_bytes": size or None, **latency}


def _teacher_latency(run: Run, teacher: Teacher) -> dict[str, float | None]:
    answered = np.flatnonzero(~np.isnan(run.answers("validation")).any(axis=1))[:64]
    examples = run.inputs.validation.table.select(run.inputs.teacher_columns).take(answered)
    batch = examples.combine_chunks().to_batches()[0]
    sizes = zip(LATENCIES, (1, 64), strict=True)
    return {name: _median_ms(lambda n=n: teacher.logits(batch.slice(0, n))) for name, n in sizes}


def _median_ms(call: Any, repeats: int = 11) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times))


def _calls(run: Run, bought: list[dict[str, Any]]) -> dict[str, int]:
    """Count the rows that the teacher was asked about, and those of the pool that it was spared."""
    where = run.directory
    datasets = {name: where.asked(name) for name in ("validation", "test")} | {"uniform": run.comparison.labels(0)}
    calls = {
        name: read_json(where.summary(path))["calls"] for name, path in datasets.items() if where.summary(path).exists()
    }
    asked = sum(b["rows"] + b["failed"] for b in bought)
    labelled, paid = (sum(b[name] for b in bought) for name in ("rows", "calls"))
    return {**calls, "labels": paid, "labelled": labelled, "saved": run.inputs.pool.rows - asked}


def _round(run: Run, number: int, summary: dict[str, Any]) -> dict[str, Any]:
    """Describe what a round bought: where the pool's and the bought gains lie, and how often the teacher is right there."""
    plan = read_json(run.directory.selected(number) / "plan.json")
    entry = {
        "summary": summary,
        **{name: plan.get(name) for name in ("method", "budget", "examples", "wrong", "value")},
    }
    gains = [_column(file, "gain") for file in sorted(run.directory.gains(number).glob("*.parquet"))]
    if not gains:  # of a choice that does not look at the examples
        return entry
    edges = np.linspace(0, max(float(g.max(initial=0)) for g in gains), _BINS + 1)
    bought = np.concatenate([_column(path, "gain") for path in read_manifest(run.directory.labels(number)).paths()])
    return {
        **entry,
        "edges": edges.tolist(),
        "pool": np.sum([np.histogram(g, edges)[0] for g in gains], axis=0).tolist(),
        "bought": np.histogram(bought, edges)[0].tolist(),
        "validation": _validation_curve(run, number, edges),
    }


def _validation_curve(run: Run, number: int, edges: npt.NDArray[np.float64]) -> dict[str, list[int]]:
    """Count the validation examples, and those that the teacher has right, by the gain that the round's student gives them."""
    answers = run.answers("validation")
    answered = ~np.isnan(answers).any(axis=1)
    scored = run.config.selection.scored or run.config.selection.gain
    gain = gain_named(scored)(run.student_logits(run.directory.chooser(number), "validation"))
    right = answers.argmax(axis=1) == run.truth("validation")
    count = np.histogram(gain[answered], edges)[0]
    return {"count": count.tolist(), "right": np.histogram(gain[answered & right], edges)[0].tolist()}


def _column(path: Path | str, name: str) -> npt.NDArray[np.float32]:
    column: npt.NDArray[np.float32] = pq.read_table(path, columns=[name], page_checksum_verification=True)[
        name
    ].to_numpy()
    return column
