"""Tabular data: a run from the first labels to a student, on rows that are generated here.

    python examples/tabular.py [DIRECTORY]

A large network that has seen 2,000 labelled rows is the teacher. The student, which has 2 % of its parameters,
begins with 60 rows and buys 2 x 100 labels. About a minute on one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.datasets import make_classification

from distilbeam.pipelines import run
from distilbeam.student import load_student

CLASSES = ("basic", "plus", "premium", "trial")
FEATURES = 20


def main(directory: Path) -> None:
    """Write the data and the teacher, run, and say what came of it."""
    directory.mkdir(parents=True, exist_ok=True)
    x, y = make_classification(3_760, FEATURES, n_informative=10, n_classes=4, n_clusters_per_class=2, random_state=0)
    x = x.astype(np.float32)
    parts = {"labelled": (0, 60), "validation": (60, 260), "test": (260, 760), "pool": (760, 1_760)}
    for name, (start, end) in parts.items():
        pq.write_table(table(x[start:end], None if name == "pool" else y[start:end]), directory / f"{name}.parquet")
    save_teacher(x[1_760:], y[1_760:], directory / "teacher.pt2")

    done = run(
        {
            "run": {"directory": "run", "rounds": 2},
            "data": {
                **{name: f"{name}.parquet" for name in parts},
                "label": "plan",
                "classes": list(CLASSES),
            },
            "teacher": {"kind": "torch", "model": "teacher.pt2", "input": {"columns": ["features"]}},
            "selection": {"budget": 100},
            "student": {"kind": "mlp", "hidden": [32], "input": {"columns": ["features"]}},
            "training": {"epochs": 20, "batch_size": 128, "lr": 0.01, "ensemble": 2},
        },
        base=directory,
    )
    test = pq.read_table(directory / "test.parquet")
    for number in (0, 2):
        found = load_student(done / f"students/round={number:03d}").predict(test)
        right = np.mean(found["prediction"].to_numpy() == test["plan"].to_numpy())
        print(f"student after round {number}: {right:.1%} of the test rows")
    print(f"report: {done / 'report/report.html'}")


def table(x: np.ndarray, y: np.ndarray | None) -> pa.Table:
    """Put features into one column of lists of a fixed length, and class numbers into one of names."""
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    labels = {} if y is None else {"plan": [CLASSES[label] for label in y]}
    return pa.table({"features": features, **labels})


def save_teacher(x: np.ndarray, y: np.ndarray, path: Path) -> None:
    """Train a network on rows that nobody else sees, and export it; its batch may have any size."""
    torch.manual_seed(0)
    hidden = [torch.nn.Linear(FEATURES, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128), torch.nn.ReLU()]
    network = torch.nn.Sequential(*hidden, torch.nn.Linear(128, len(CLASSES)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rows, labels = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(15):
        for index in torch.randperm(len(rows)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(rows[index]), labels[index]).backward()
            optimizer.step()
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    # a program keeps its example, and a slice would keep all that it was cut from
    program = torch.export.export(network.eval(), (rows[:2].clone(),), dynamic_shapes=shapes)
    torch.export.save(program, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="tabular-")))
