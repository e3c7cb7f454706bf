"""A small problem that every end-to-end test can afford: three Gaussian classes and a linear teacher that errs at times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.teacher.softlabels import read_manifest

SUPPORT = Path(__file__).resolve().parent
CLASSES, FEATURES = 3, 4


def make_table(rows: int, seed: int, labelled: bool) -> pa.Table:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    x = (rng.normal(size=(rows, FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[labels]).astype(np.float32)
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), FEATURES)
    columns = {"key": [f"{seed}-{i}" for i in range(rows)], "x": features}
    return pa.table(columns | ({"label": labels} if labelled else {}))


def write_problem(directory: Path, pool_rows: int = 240, files: int = 4) -> dict[str, Any]:
    (directory / "pool").mkdir(parents=True)
    pool = make_table(pool_rows, 1, labelled=False)
    step = -(-pool_rows // files)
    for number in range(files):
        part = pool.slice(number * step, step)
        pq.write_table(part, directory / "pool" / f"{number}.parquet", row_group_size=20)
    for name, rows, seed in (("labelled", 15, 2), ("validation", 60, 3), ("test", 80, 4)):
        pq.write_table(make_table(rows, seed, labelled=True), directory / f"{name}.parquet")
    sets = {name: f"{name}.parquet" for name in ("labelled", "validation", "test")}
    return {
        "run": {"rounds": 2, "seed": 0, "directory": "run"},
        "data": {"pool": "pool", **sets, "id": "key"},
        "teacher": {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": str(directory / "asked.log")},
            "input": {"columns": ["x"]},
        },
        "selection": {"method": "rad", "budget": 30},
        "student": {"kind": "mlp", "hidden": [8], "input": {"columns": ["x"]}},
        "training": {"epochs": 3, "self_training": False, "final_training": "apart"},
        "engine": {"unit_rows": 40, "shard_rows": 8, "batch_rows": 16, "teacher_batch": 8},
    }


WORDS = ("card lost stolen", "money transfer abroad", "limit raise more")


def add_texts(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Give the rows of `write_problem` a text of three words, mostly of their likely class; return settings of a text student."""
    sets = [directory / f"{name}.parquet" for name in ("labelled", "validation", "test")]
    for file in [*sorted((directory / "pool").glob("*.parquet")), *sets]:
        table = pq.read_table(file)
        rng = np.random.default_rng(table.num_rows)
        likely = np.array(table["x"].to_pylist())[:, :CLASSES].argmax(axis=1)
        texts = [" ".join(rng.permutation((WORDS[c] + " please now").split())[:3]) for c in likely]
        pq.write_table(table.append_column("text", pa.array(texts)), file, row_group_size=20)
    inputs = {"kind": "text", "columns": ["text"], "buckets": 64}
    return {**settings, "student": {"kind": "text", "dim": 4, "input": inputs}}


def asked(directory: Path) -> list[str]:
    """The rows that the teacher was asked about, in order."""
    log = directory / "asked.log"
    return log.read_text().splitlines() if log.exists() else []


def labels_of(directory: Path) -> pa.Table:
    """The rows of a soft-label dataset of a run, in the order of the pool."""
    manifest = read_manifest(directory)
    return pa.concat_tables(pq.read_table(path) for path in manifest.paths()).sort_by("pool_row")
