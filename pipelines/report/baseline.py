"""The baseline of a run: logistic regression on the labels that its last student learned, human ones and the teacher's best classes.

Scikit-learn as it comes: of texts TF-IDF of words and pairs of words (sublinear term frequencies, C = 10), of token ids TF-IDF of
these, of anything else the numbers that the student reads, standardised (C = 1). Pseudo-labels are left out, and so are the
validation rows. A student that is not better than it is not worth its trouble. Of very many labels a part is learned, drawn by
chance, which the row's name says: the fit takes seconds to a minute.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.columns import is_bytes, plain
from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.jobs.run import Run
from distilbeam.student.data.usable_rows import find_usable
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.teacher.softlabels import decode, read_manifest
from distilbeam.teacher.softlabels.manifest import Manifest

NAME = "logistic regression"
TEXTS = "TF-IDF, logistic regression"
ROWS = 10_000
NUMBERS = 2**24  # of the inputs together, where they are no texts
FEATURES = 2**16  # terms that TF-IDF keeps, the most frequent ones
ITERATIONS = 200


def baseline_row(run: Run, name: str) -> dict[str, Any]:
    """Fit the baseline and measure it.

    Args:
      run: the run, whose rounds are labelled.
      name: the labelled set to measure on.

    Returns:
      A row as those of the students, without latency and size; or `why`: there is nothing that it could learn.
    """
    config = run.config.student.input
    documents, learned, bought = _learned(run, config)
    title = TEXTS if config.kind in ("text", "tokens") else NAME
    if len(set(learned.tolist())) < 2:
        return {"name": title, "why": "the labels are of a single class"}
    model = _pipeline(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stops before it has converged, and columns without any spread
        model.fit(documents, learned)
    tested, rows = _read(run.labelled_set(name).table, config)
    assert len(rows) == run.labelled_set(name).plan.rows, "labelled sets have usable rows alone"
    logits = np.full((len(rows), len(run.inputs.classes)), -30.0)  # of a class without a label: e^-30
    logits[:, model.classes_] = np.maximum(model.predict_log_proba(tested), -30.0)
    cut = f", {len(learned):,} rows" if len(learned) < run.inputs.labelled.plan.rows + bought else ""
    return {
        "name": f"{title}{cut}",
        "labels": bought,
        **evaluate(logits, run.truth(name), run.answers(name)),
        "parameters": int(model[-1].coef_.size + model[-1].intercept_.size),
        "size_bytes": None,
        "latency_ms_batch1": None,
        "latency_ms_batch64": None,
    }


def _most(run: Run, config: InputConfig) -> int:
    if config.kind in ("text", "tokens"):
        return ROWS
    first = run.inputs.labelled.table.select(list(config.columns)).slice(0, 1).combine_chunks().to_batches()[0]
    return max(2, min(ROWS, NUMBERS // max(1, np.asarray(make_input(config)(first)).size)))


def _learned(run: Run, config: InputConfig) -> tuple[Any, npt.NDArray[np.int64], int]:
    """Read what is learned: inputs and int64 class indices of human-labelled and of bought rows; and count those bought."""
    manifests = [read_manifest(dataset) for dataset in run.soft_labels]
    entries = [
        (manifest, path, entry.rows)
        for manifest in manifests
        for path, entry in zip(manifest.paths(), manifest.entries, strict=True)
    ]
    human = run.inputs.labelled.plan.rows
    ends = np.cumsum([human, *(rows for _, _, rows in entries)])
    drawn = np.random.default_rng(run.config.run.seed).permutation(ends[-1])[: _most(run, config)]
    by_part = np.split(np.sort(drawn), np.searchsorted(np.sort(drawn), ends[:-1]))
    documents: list[Any] = []
    labels = []
    for number, rows in enumerate(by_part):
        local = rows - (ends[number - 1] if number else 0)
        if number == 0:
            table, best = run.inputs.labelled.table, run.truth("labelled")
        elif len(local):
            table, best = _bought(*entries[number - 1][:2])
        if len(local):
            read, usable = _read(table.take(pa.array(local)), config)
            if len(usable):
                documents.append(read)
                labels.append(best[local][usable])
    texts = config.kind in ("text", "tokens")
    together = [value for part in documents for value in part] if texts else np.concatenate(documents)
    return together, np.concatenate(labels), int(ends[-1]) - human


def _bought(manifest: Manifest, path: Path) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Read a shard and the teacher's best class of each row."""
    shard = pq.read_table(path)
    answer = decode(shard, manifest.spec)
    best = answer.logprobs.argmax(axis=1)
    if answer.classes is not None:
        best = np.take_along_axis(answer.classes, best[:, None], axis=1)[:, 0]
    return shard, best.astype(np.int64)


def _read(table: pa.Table, config: InputConfig) -> tuple[Any, npt.NDArray[np.int64]]:
    """Read the documents or numbers of a table's usable rows, and which rows these are."""
    column = plain(table[config.columns[0]].combine_chunks())
    if config.kind in ("text", "tokens"):
        if is_bytes(column.type):
            column = column.cast(pa.large_string())
        values: Sequence[Any] = column.to_pylist()
        rows = [row for row, value in enumerate(values) if value is not None]
        return [values[row] for row in rows], np.array(rows, np.int64)
    found = [find_usable(make_input(config), batch) for batch in table.combine_chunks().to_batches()]
    parts = [part.inputs.reshape(len(part.inputs), -1) for part in found if part.inputs is not None]
    return np.concatenate(parts) if parts else parts, found[0].rows


def _pipeline(config: InputConfig) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if config.kind == "text":
        terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=FEATURES)
        return make_pipeline(terms, LogisticRegression(C=10, max_iter=ITERATIONS))
    if config.kind == "tokens":
        terms = TfidfVectorizer(analyzer=_tokens, sublinear_tf=True, max_features=FEATURES)
        return make_pipeline(terms, LogisticRegression(C=10, max_iter=ITERATIONS))
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))


def _tokens(ids: Sequence[int]) -> list[str]:
    return [str(number) for number in ids]
