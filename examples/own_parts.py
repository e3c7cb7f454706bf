"""Parts of your own: a teacher of scikit-learn, a student network, a strategy, all in this file.

    python examples/own_parts.py [DIRECTORY]

A configuration names them as `module:name`, and the module must be importable: beside the script, installed, or on
PYTHONPATH. The teacher is a random forest, which the network imitates without ever meeting it. About a minute on
one core.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from apache_beam.ml.inference.base import ModelHandler
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

from distilbeam.pipelines import run
from distilbeam.selection import CandidatePool, Selector
from distilbeam.student import load_student


class Forest(ModelHandler[np.ndarray, np.ndarray, RandomForestClassifier]):
    """The teacher: a ModelHandler of Beam's, which anything that answers can be."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load_model(self) -> RandomForestClassifier:
        """Load the forest. It is a pickle, of our own making: never load one that somebody sent you."""
        return pickle.loads(Path(self.path).read_bytes())

    def run_inference(
        self,
        batch: Sequence[np.ndarray],
        model: RandomForestClassifier,
        inference_args: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> list[np.ndarray]:
        """Answer rows with probabilities, which `answers` says in the configuration."""
        return list(model.predict_proba(np.stack(batch)))


class Maxout(torch.nn.Module):
    """The student: a network of your own, of inputs [B, features] to logits [B, classes]."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, pieces: int = 4) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(input_shape[0], 48 * pieces), torch.nn.Linear(48, num_classes)
        self.pieces = pieces

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits."""
        return self.last(self.first(x).unflatten(1, (48, self.pieces)).amax(dim=2))


class HalfAndHalf(Selector):
    """The strategy: half of the budget for the largest gains, half by chance."""

    name = "half-and-half"
    reads = ("gains",)

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> np.ndarray:
        order = np.argsort(-np.asarray(pool.gains))
        chosen = np.zeros(pool.size, bool)
        chosen[order[: budget // 2]] = True
        chosen[rng.choice(order[budget // 2 :], budget - budget // 2, replace=False)] = True
        return chosen


def main(directory: Path) -> None:
    """Train the forest, run with all three, and compare."""
    directory.mkdir(parents=True, exist_ok=True)
    x, y = load_digits(return_X_y=True)
    x, order = x.astype(np.float32) / 16, np.random.default_rng(0).permutation(len(x))
    parts = {"labelled": order[:60], "validation": order[60:260], "test": order[260:660], "pool": order[660:1_300]}
    for name, rows in parts.items():
        columns = {"pixels": pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel()), 64)}
        pq.write_table(
            pa.table(columns | ({} if name == "pool" else {"digit": y[rows]})), directory / f"{name}.parquet"
        )
    forest = RandomForestClassifier(300, random_state=0).fit(x[order[1_300:]], y[order[1_300:]])
    (directory / "forest.pickle").write_bytes(pickle.dumps(forest))

    columns = {"columns": ["pixels"]}
    done = run(
        {
            "run": {"directory": "run", "rounds": 2},
            "data": {**{name: f"{name}.parquet" for name in parts}, "label": "digit"},
            "teacher": {
                "kind": "beam",
                "handler": "own_parts:Forest",
                "arguments": {"path": str(directory.resolve() / "forest.pickle")},
                "files": ["forest.pickle"],
                "answers": "probabilities",
                "input": columns,
            },
            "selection": {"method": "own_parts:HalfAndHalf", "budget": 80},
            "student": {"kind": "own_parts:Maxout", "options": {"pieces": 2}, "input": columns},
            # without the last training, which takes most of the time
            "training": {"epochs": 30, "lr": 0.01, "self_training": False, "final_training": "apart"},
        },
        base=directory,
    )
    test = pq.read_table(directory / "test.parquet")
    for number in (0, 2):
        # a student's folder names code, which is called where you name it too
        student = load_student(done / f"students/round={number:03d}", trust=["own_parts"])
        right = np.mean(student.predict(test)["prediction"].to_numpy() == test["digit"].to_numpy().astype(str))
        print(f"student after round {number}: {right:.1%} of the test rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="parts-")))
