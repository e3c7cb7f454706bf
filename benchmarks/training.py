"""Examples per second of a training, against the same loop without our loader and loss.

    python benchmarks/training.py --quick                                # about a minute
    python benchmarks/training.py --json benchmarks/results/training.json      # about a quarter of an hour

The limit: tensors in memory, rows taken by a permutation, torch's own KL divergence, and otherwise the same student,
optimizer, learning rate and clipping, written as plainly as can be. Ours: `train` over a soft-label dataset of Parquet
files, with everything it does (loading, loss, figures, validation-free epochs, no checkpoint). Each repetition runs both
in turn; a run's time is that of its steps after the first epoch, which opens files and warms up. Ratios are of medians.
One thread unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from measuring.record import machine, write
from torch import nn

from distilbeam.progress import Progress
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.optimizer import make_optimizer, set_lr
from distilbeam.student.training.train import train
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

EPOCHS = 3  # the first is not counted


@dataclass(frozen=True)
class Case:
    """A student and its data.

    Attributes:
      name: of the row.
      student: what is trained.
      shape: of one example.
      classes: number of classes.
      batch_size: examples per step.
      rows: examples in an epoch.
      kind: of the soft labels.
    """

    name: str
    student: dict[str, Any]
    shape: tuple[int, ...]
    classes: int
    batch_size: int
    rows: int
    kind: str = "dense"

    @property
    def config(self) -> StudentConfig:
        """The student's configuration."""
        return StudentConfig.model_validate({**self.student, "input": {"columns": ["x"], "shape": list(self.shape)}})

    @property
    def training(self) -> TrainConfig:
        """The training's configuration."""
        return TrainConfig(epochs=EPOCHS, batch_size=self.batch_size, checkpoint_seconds=1e9)


def cases(quick: bool) -> list[Case]:
    """List what is measured."""
    part = 4 if quick else 1
    mlp = {"kind": "mlp", "hidden": [256, 256]}
    return [
        Case("mlp 64-256-256, 10 classes", mlp, (64,), 10, 256, 131_072 // part),
        Case("mlp 64-64-64, 10 classes", {"kind": "mlp", "hidden": [64, 64]}, (64,), 10, 64, 32_768 // part),
        Case("mlp 512-256-256, 1,000 classes", mlp, (512,), 1_000, 256, 16_384 // part),
        Case("mlp 512-256-256, top 50 of 1,000", mlp, (512,), 1_000, 256, 16_384 // part, "top_k"),
        Case(
            "cnn w=0.25, 32 x 32 colour, 10 classes",
            {"kind": "cnn", "width": 0.25},
            (3, 32, 32),
            10,
            128,
            4_096 // part,
        ),
    ]


class Data:
    """A case's examples: in memory, and as a soft-label dataset."""

    def __init__(self, case: Case, directory: Path) -> None:
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(case.rows, *case.shape)).astype(np.float32)
        logits = 3 * rng.normal(size=(case.rows, case.classes)).astype(np.float32)
        self.inputs = torch.from_numpy(inputs)
        self.logprobs = torch.from_numpy(logits).log_softmax(1)
        self.directory = directory
        spec = SoftLabelSpec(
            case.classes, kind=case.kind, k=50 if case.kind == "top_k" else None, teacher="benchmark", carried=("x",)
        )
        labels = encode(logits, spec)
        flat = pa.array(inputs.reshape(-1))
        columns = {
            "example_id": [str(i) for i in range(case.rows)],
            "x": pa.FixedSizeListArray.from_arrays(flat, inputs[0].size),
            **dict(zip(labels.schema.names, labels.columns, strict=True)),
        }
        write_shard(directory, "shard-0", pa.table(columns), spec, "benchmark")


class _Clock(Progress):
    def __init__(self, times: list[float]) -> None:
        self._times = times

    def step(self, done: int, total: int, note: str = "") -> None:  # noqa: ARG002
        self._times.append(time.perf_counter())


def ours(case: Case, data: Data, directory: Path) -> float:
    """Train with the library; return examples per second after the first epoch."""
    times: list[float] = []
    train(
        case.config,
        case.training,
        classes=[str(i) for i in range(case.classes)],
        labelled=None,
        label_column="label",
        soft_labels=[data.directory],
        validation=None,
        directory=directory,
        seed=0,
        progress=_Clock(times),
    )
    steps = len(times) // EPOCHS
    return (EPOCHS - 1) * case.rows / (times[-1] - times[steps - 1])


def limit(case: Case, data: Data) -> float:
    """Train with a plain loop over tensors; return examples per second after the first epoch."""
    torch.manual_seed(0)
    module = build_student(case.config, case.shape, case.classes)
    optimizer = make_optimizer(module, case.training)
    steps = -(-case.rows // case.batch_size)
    began = 0.0
    for epoch in range(EPOCHS):
        if epoch == 1:
            began = time.perf_counter()
        order = torch.randperm(case.rows)
        for step, rows in enumerate(order.split(case.batch_size)):
            set_lr(optimizer, case.training, epoch * steps + step, EPOCHS * steps)
            logprobs = module(data.inputs[rows]).log_softmax(1)
            loss = nn.functional.kl_div(logprobs, data.logprobs[rows], log_target=True, reduction="batchmean")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            float(loss.detach())
    return (EPOCHS - 1) * case.rows / (time.perf_counter() - began)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Measure a case, ours and the limit in turn."""
    rates: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(case, Path(temporary) / "labels")
        for repeat in range(repeats):
            rates[0].append(ours(case, data, Path(temporary) / f"student-{repeat}"))
            rates[1].append(limit(case, data))
    medians = [statistics.median(column) for column in rates]
    return {
        "case": case.name,
        "batch_size": case.batch_size,
        "rows": case.rows,
        "repeats": repeats,
        "examples_per_s": round(medians[0]),
        "limit_examples_per_s": round(medians[1]),
        "ratio": round(medians[0] / medians[1], 3),
        "ratios": [round(a / b, 3) for a, b in zip(*rates, strict=True)],
    }


def line(row: dict[str, Any]) -> str:
    """Lay a case's result out for reading."""
    rates = f"{row['examples_per_s']:>12,}{row['limit_examples_per_s']:>12,}"
    return f"{row['case']:42}{row['batch_size']:>6}{rates}{row['ratio']:>8.3f}"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the examples")
    parser.add_argument("--repeats", type=int, help="of each case; 9, and 3 for --quick")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine(("torch", "numpy", "pyarrow"), threads=options.threads)
    print(f"{'':42}{'batch':>6}{'ours /s':>12}{'limit /s':>12}{'ratio':>8}")
    results = []
    for case in cases(options.quick):
        results.append(measure(case, options.repeats or (3 if options.quick else 9)))
        print(line(results[-1]), flush=True)
        write(options.json, about, results)


if __name__ == "__main__":
    main()
