"""The figures of a run of a language model: quality by round, what was chosen, what it cost; collected into `report/metrics.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from distilbeam.inputs.blocks import COMPLETION_MASK, SEGMENT_IDS, has_label
from distilbeam.pipelines.acquisition.score_blocks import arrays_of
from distilbeam.pipelines.acquisition.unusable_rows import read_unusable, unusable_list
from distilbeam.pipelines.engine.model_cache import cached_teacher
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.language.run import TokenRun
from distilbeam.progress import Progress
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import DESCRIPTION
from distilbeam.student.data import TokenLabelDataset
from distilbeam.student.language.evaluate import BLOCKS, GIVEN, beginning, measure, token_bytes
from distilbeam.teacher.backends.torch import find_device
from distilbeam.teacher.softlabels import read_manifest

UNIT = "token"  # of results of language models, in metrics.json
_BINS = 20
_MEASURES = (
    "tokens",
    "bytes",
    "nll",
    "bits_per_byte",
    "perplexity",
    "teacher_nll",
    "teacher_bits_per_byte",
    "kl",
    "agreement",
)


def write_figures(run: TokenRun, progress: Progress) -> None:
    """Measure the teacher and every student and write `report/metrics.json`."""
    where, config = run.directory, run.config
    name = "validation" if config.data.test is None else "test"
    bought = [_bought(where, r) for r in range(config.run.rounds)]
    labelled = np.cumsum([0, *(entry["labels"] for entry in bought)]).tolist()
    rows: dict[str, tuple[str, Path, int]] = {}
    for number in range(config.run.rounds + 1):
        title = f"student, round {number}" if number else "student, before"
        rows[f"round {number}"] = (title, where.student(number), labelled[number])
    if config.run.compare_plain:
        rows["plain"] = ("student, text alone", run.plain.student(config.run.rounds), labelled[-1])
    if config.selection.compare_uniform:
        uniform = _bought(run.comparison, 0)
        rows["uniform"] = ("student, uniform choice", run.comparison.student(1), uniform["labels"])
    found: dict[str, dict[str, Any]] = {}
    with run.own_threads():
        for done, (key, (title, directory, labels)) in enumerate(rows.items(), 1):
            found[key] = {"name": title, "labels": labels, **_student(run, directory, name)}
            progress.step(done, len(rows))
    last = found[f"round {config.run.rounds}"]
    results: dict[str, Any] = {
        "unit": UNIT,
        "evaluated_on": name,
        "evaluated_tokens": last["tokens"],
        "teacher": _teacher(run, last),
        "students": [found[f"round {number}"] for number in range(config.run.rounds + 1)],
        **{key: found[key] for key in ("plain", "uniform") if key in found},
        "kept": {"round": config.run.rounds, "worse": []},
        "given": last["given"],
        "pool_blocks": run.inputs.pool.rows,
        "sequence_length": run.inputs.length,
        "labels": {"kind": config.labels.kind, "k": config.labels.k, "bytes": sum(e["bytes"] for e in bought)},
        "rounds": bought,
        "asked": {n: read_json(where.summary(where.asked(n)))["calls"] for n in run.inputs.held_out},
        "unusable": _unusable(run),
        "work": read_json(where.work) if where.work.exists() else {},
    }
    if "uniform" in found:
        results["asked"]["uniform"] = read_json(run.comparison.summary(run.comparison.labels(0)))["calls"]
    (where.report / "report.html").unlink(missing_ok=True)  # it shows former figures
    write_json(where.metrics, results)


def are_current(run: TokenRun) -> bool:
    """Tell whether the figures on disk are of the rounds and the comparisons that the configuration names."""
    if not run.directory.metrics.exists():
        return False
    found, config = read_json(run.directory.metrics), run.config
    wanted = {"plain": config.run.compare_plain, "uniform": config.selection.compare_uniform}
    return len(found["rounds"]) == config.run.rounds and all((name in found) == is_ for name, is_ in wanted.items())


def _student(run: TokenRun, directory: Path, name: str) -> dict[str, Any]:
    """Measure a student, and let it continue a line; what its training measured last on the same blocks is taken from there."""
    model, labels = run.language_model(directory), run.directory.asked(name)
    trained = model.extra["metrics"]
    prefix = f"{name}_"
    figures = {key.removeprefix(prefix): value for key, value in trained.items() if key.startswith(prefix)}
    if not figures:
        blocks = TokenLabelDataset(labels, BLOCKS, 0, columns=())
        lengths = token_bytes(model.tokenizer, blocks.spec.num_classes)
        figures = measure(model.network, blocks, blocks.spec, lengths, find_device(run.device, "training.device"))
    given = beginning(model, labels)
    said = read_json(directory / DESCRIPTION)
    return {
        **{key: figures[key] for key in _MEASURES if key in figures},
        "parameters": said["num_parameters"],
        "size_bytes": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        "tokens_per_s": trained.get("tokens_per_s"),
        "given": given,
        "continued": model.complete(given, GIVEN).removeprefix(given),
    }


def _teacher(run: TokenRun, student: dict[str, Any]) -> dict[str, Any]:
    """Say how good the teacher is on the same tokens, what it adds to the same line, how fast it answered."""
    answering: Any = cached_teacher(run.teacher())
    complete = getattr(answering.teacher, "complete", None)  # a server is asked for labels alone
    work = read_json(run.directory.work) if run.directory.work.exists() else {}
    seconds = work.get("label", {}).get("teacher_s", 0.0)
    asked = work.get("label", {}).get("teacher_calls", 0) * run.inputs.length
    return {
        "name": "teacher",
        "nll": student.get("teacher_nll"),
        "bits_per_byte": student.get("teacher_bits_per_byte"),
        "continued": None if complete is None else complete(student["given"], GIVEN).removeprefix(student["given"]),
        "seconds": seconds,
        "tokens_per_s": asked / seconds if seconds else None,
        "kind": run.config.teacher.kind,
    }


def _bought(where: RunDirectory, number: int) -> dict[str, Any]:
    """Describe what a round bought: how many blocks, labels and bytes, by which plan, and the gains there and in what was left."""
    summary = read_json(where.summary(where.labels(number)))
    plan = read_json(where.selected(number) / "plan.json")
    paths = read_manifest(where.labels(number)).paths()
    labels = sum(_labelled_positions(path) for path in paths)
    entry = {
        **{name: plan.get(name) for name in ("method", "budget", "examples")},
        **{name: summary[name] for name in ("rows", "failed", "calls", "requests", "reused", "bytes", "seconds")},
        "labels": labels,
    }
    gains = [_column(file, "gain") for file in sorted(where.gains(number).glob("*.parquet"))]
    if not gains:  # of a choice that does not look at the blocks
        return entry
    pool, own = np.concatenate(gains), np.concatenate([_column(path, "gain") for path in paths])
    # from the least on: mean entropies of blocks lie close together and far from 0, where one bar would hold them all
    edges = np.histogram_bin_edges(np.concatenate([pool, own]), _BINS)
    return {
        **entry,
        "edges": edges.tolist(),
        "pool": np.histogram(pool, edges)[0].tolist(),
        "bought": np.histogram(own, edges)[0].tolist(),
        "mean_gain": {"pool": float(pool.mean()), "bought": float(own.mean())},
    }


def _labelled_positions(path: str | Path) -> int:
    total = 0
    for batch in pq.ParquetFile(path).iter_batches(1024, columns=["input_ids", SEGMENT_IDS, COMPLETION_MASK]):
        blocks = arrays_of(batch)
        total += int(has_label(blocks[SEGMENT_IDS], blocks[COMPLETION_MASK]).sum())
    return total


def _unusable(run: TokenRun) -> dict[str, Any]:
    """Count the blocks of the pool that could not be scored, and name the lists that have them."""
    where = run.directory
    lists = {r: read_unusable(where.gains(r)) for r in range(run.config.run.rounds)}
    rows = {(row["file"], row["row"]) for found in lists.values() for row in found}
    files = [str(unusable_list(where.gains(r)).relative_to(where.root)) for r, found in lists.items() if found]
    return {"rows": len(rows), "lists": files}


def _column(path: Path | str, name: str) -> npt.NDArray[np.float32]:
    table = pq.read_table(path, columns=[name], page_checksum_verification=True)
    column: npt.NDArray[np.float32] = table[name].to_numpy()
    return column
