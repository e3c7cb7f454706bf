"""Students of several widths on CIFAR-10: plain, distilled with augmentation, and in 8 bits, beside published figures.

The published figures are the table of Menghani's survey "Efficient Deep Learning" (2021, arXiv 2106.08962).

    python benchmarks/students.py --quick                                   # handwritten digits, about a minute
    python benchmarks/students.py --data DIR --minutes 240 --work runs/students --json benchmarks/results/students.json

DIR holds cifar10-train.parquet and cifar10-test.parquet (columns image, JPEG or PNG bytes, and label). The last rows of
the training file are the validation set, which chooses epochs; the first --rows are what teacher and students learn from.

1. A teacher (the same network, wider) is trained on the human labels, with augmentation, and exported to ONNX.
2. A labelling job asks that export about all rows and writes soft labels: a run of at least 20,000 examples by default.
3. For each width: a plain student (human labels alone, no augmentation), and a distilled one (soft labels alone, with
   augmentation), the latter also as int8 export calibrated on rows that it was trained on. The test set is only looked at
   in the end.

--minutes bounds the processor's time for all trainings together, which a busy machine does not change: two fifths go to
the teacher, the rest is shared by the students. Epochs are what fits at the rate measured in the beginning; a width that
does not get --least-epochs is left out, the widest first. The survey trains on all 50,000 labels for
as long as it takes; its figures are a level to look up to, not one to be met in an hour. With --work, a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring.record import machine, write
from PIL import Image
from rich.console import Console
from rich.table import Table

from distilbeam.inputs.config import make_input
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.display import Display, configure_logs
from distilbeam.pipelines.experiments.model_metrics import logits_of
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import AugmentConfig, TrainConfig
from distilbeam.student.training.optimizer import make_optimizer
from distilbeam.student.training.train import train


@dataclass(frozen=True)
class Surveyed:
    """A row of the survey's table: accuracies in percent, sizes in KB."""

    parameters: int
    plain: float
    distilled: float
    int8: float
    size_kb: int
    int8_kb: int


SURVEY = {
    0.05: Surveyed(14_713, 70.17, 72.89, 72.70, 65, 27),
    0.1: Surveyed(26_044, 75.93, 78.93, 78.55, 110, 39),
    0.25: Surveyed(98_570, 80.60, 84.51, 84.18, 392, 111),
    0.5: Surveyed(350_058, 83.04, 88.03, 87.86, 1374, 359),
    0.75: Surveyed(764_874, 83.79, 89.51, 89.29, 2994, 767),
    1.0: Surveyed(1_343_018, 84.42, 89.92, 89.91, 5251, 1334),
}
CIFAR10_SHAPE = (3, 32, 32)
TEACHER_SHARE = 0.4
BATCH = 64
MOST_EPOCHS = 100
AUGMENT = AugmentConfig(flip=True, crop=4)
TIMED_STEPS = 6
CALIBRATION_ROWS = 1024


@dataclass(frozen=True)
class Data:
    """Where the examples are, as raw pixels beside their labels.

    Attributes:
      rows: Parquet of the rows to learn from.
      validation, test: tables.
      classes: names.
      shape: of an image, [channels, height, width].
      mean, std: of the pixels between 0 and 1.
      augment: changes that keep the class.
    """

    rows: Path
    validation: pa.Table
    test: pa.Table
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: float
    std: float
    augment: AugmentConfig

    def student(self, width: float) -> StudentConfig:
        """Configure the survey's network over raw pixels."""
        pixels = {"columns": ["pixels"], "dtype": "uint8", "shape": self.shape, "scale": 1 / 255}
        return StudentConfig(
            kind="cnn", width=width, dropout=0.1, input={**pixels, "mean": [self.mean], "std": [self.std]}
        )


def cifar10(directory: Path, work: Path, rows: int, held_out: int) -> Data:
    """Decode the images once; the last `held_out` rows of the training file validate."""
    file = pq.ParquetFile(directory / "cifar10-train.parquet")
    names = tuple(file.schema_arrow.metadata[b"classes"].decode().split(","))
    table = file.read()
    if rows + held_out > table.num_rows:
        raise ValueError(
            f"--rows must be at most {table.num_rows - held_out:,}, beside {held_out:,} that validate, got {rows:,}"
        )
    path = work / "rows.parquet"
    if not path.exists():
        pq.write_table(_decoded(table.slice(0, rows)), path, row_group_size=2_000)
    validation = _decoded(table.slice(table.num_rows - held_out))
    test = _decoded(pq.read_table(directory / "cifar10-test.parquet"))
    return Data(path, validation, test, names, CIFAR10_SHAPE, 0.473, 0.251, AUGMENT)


def digits(work: Path) -> Data:
    """Enlarge scikit-learn's handwritten digits to 16 x 16 in three channels: the same steps, in no time."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = (np.kron(raw.images[order], np.ones((1, 2, 2))) * 15).astype(np.uint8)
    pixels = np.repeat(images[:, None], 3, axis=1)
    table = _table(pixels, raw.target[order])
    path = work / "rows.parquet"
    pq.write_table(table.slice(0, 1200), path, row_group_size=200)
    classes = tuple(str(digit) for digit in range(10))
    return Data(path, table.slice(1200, 200), table.slice(1400), classes, (3, 16, 16), 0.3, 0.37, AugmentConfig(crop=1))


def _decoded(table: pa.Table) -> pa.Table:
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"].to_pylist()]
    return _table(np.stack(images).transpose(0, 3, 1, 2), table["label"].to_numpy())


def _table(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer]) -> pa.Table:
    width = int(np.prod(pixels.shape[1:]))
    data = pa.py_buffer(np.ascontiguousarray(pixels).tobytes())
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(pixels), [None, data])
    return pa.table({"pixels": column, "label": labels.astype(np.int64)})


def seconds_per_example(data: Data, width: float) -> float:
    """Time forward and backward passes of a width on the processor, the least of a few."""
    module = build_student(data.student(width), data.shape, len(data.classes))
    training = TrainConfig(batch_size=BATCH)
    optimizer = make_optimizer(module, training)
    images, labels = torch.randn(BATCH, *data.shape), torch.zeros(BATCH, dtype=torch.int64)
    times = []
    for _ in range(TIMED_STEPS):
        start = time.process_time()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return min(times) / BATCH


def plan_epochs(
    data: Data, rows: int, teacher: float, widths: Sequence[float], seconds: float, least: int
) -> dict[str, int]:
    """Share the time out: epochs of the teacher, and of both students of each width that gets at least `least`."""
    epoch_s = {width: rows * seconds_per_example(data, width) for width in sorted({teacher, *widths})}
    epochs = {"teacher": _fitting(TEACHER_SHARE * seconds, epoch_s[teacher])}
    kept = sorted(widths)
    while kept:
        share = (1 - TEACHER_SHARE) * seconds / (2 * len(kept))
        if _fitting(share, epoch_s[kept[-1]]) >= least:
            break
        kept.pop()
    if not kept or epochs["teacher"] < least:
        raise ValueError(
            f"--minutes must be enough for {least} epochs of a teacher and of one width, got {seconds / 60:g}"
        )
    return {**epochs, **{f"{width:g}": _fitting(share, epoch_s[width]) for width in kept}}


def _fitting(seconds: float, epoch_s: float) -> int:
    return min(MOST_EPOCHS, int(seconds / epoch_s))


def train_teacher(data: Data, width: float, epochs: int, work: Path) -> Path:
    """Train the teacher on the human labels and export it to ONNX."""
    _train(data, width, epochs, work / "teacher", labelled=True, augment=data.augment)
    exported = work / "teacher-onnx"
    if not exported.exists():
        export_student(work / "teacher", "onnx", exported)
    return exported


def label(data: Data, exported: Path, work: Path, threads: int) -> tuple[Path, float]:
    """Ask the export about every row; return the soft-label dataset and the seconds it took."""
    section = json.loads((exported / "export.json").read_text())["teacher"]
    config = parse_label_config(
        {
            "run": {"directory": "labelling"},
            "data": {"pool": str(data.rows), "classes": data.classes, "carry": ["pixels"]},
            "teacher": {**section, "model": str(exported / section["model"]), "threads": threads},
        }
    )
    start = time.perf_counter()
    with opened_job(config.relative_to(work)) as job:
        plan = job.plan()
        if plan.tasks:
            with Display.silent().step("label") as progress:
                job.label(plan, pipeline_options(()), progress)
        return job.dataset, time.perf_counter() - start


def _train(
    data: Data,
    width: float,
    epochs: int,
    directory: Path,
    *,
    labelled: bool,
    augment: AugmentConfig,
    soft: Path | None = None,
) -> dict[str, float]:
    if not directory.exists():
        train(
            data.student(width),
            TrainConfig(epochs=epochs, batch_size=BATCH, lr=3e-3, warmup=0.1, augment=augment),
            classes=data.classes,
            labelled=pq.read_table(data.rows) if labelled else None,
            label_column="label",
            soft_labels=[] if soft is None else [soft],
            validation=data.validation,
            directory=directory,
            seed=0,
        )
    metrics: dict[str, float] = load_student(directory).extra["metrics"]
    return metrics


def measure(data: Data, width: float, epochs: int, soft: Path, work: Path) -> dict[str, Any]:
    """Train a width plainly and by distillation, compress it, and look at the test set."""
    truth = data.test["label"].to_numpy()
    directory = {name: work / f"{name}-{width:g}" for name in ("plain", "distilled", "int8")}
    _train(data, width, epochs, directory["plain"], labelled=True, augment=AugmentConfig())
    _train(data, width, epochs, directory["distilled"], labelled=False, augment=data.augment, soft=soft)
    student = load_student(directory["distilled"])
    if not directory["int8"].exists():
        columns = pq.read_table(data.rows, columns=["pixels"]).slice(0, CALIBRATION_ROWS).combine_chunks()
        inputs = make_input(student.config.input)(columns.to_batches()[0])
        export_student(directory["distilled"], "int8", directory["int8"], inputs, {"rows of": "the training set"})
    models = {"plain": load_student(directory["plain"]), "distilled": student, "int8": load_export(directory["int8"])}
    quality = {name: evaluate(logits_of(model, data.test), truth) for name, model in models.items()}
    return {
        "width": width,
        "epochs": epochs,
        "parameters": student.num_parameters,
        "size_bytes": student.size_bytes,
        "int8_bytes": models["int8"].size_bytes,
        **{f"{name}_{key}": value for name, found in quality.items() for key, value in found.items()},
        "survey": asdict(SURVEY[width]) if width in SURVEY and data.shape == CIFAR10_SHAPE else None,
    }


def show(rows: Sequence[dict[str, Any]], images: str) -> Table:
    """Lay the figures out, the survey's in brackets."""
    columns = ("width", "epochs", "weights", "plain %", "distilled %", "int8 %", "size KB", "int8 KB")
    table = Table(
        title=f"{images}; in brackets the figures of Menghani (2021), where there are any", title_justify="left"
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        survey = row["survey"] or {}

        def beside(text: str, key: str, survey: dict[str, Any] = survey) -> str:
            return f"{text} ({survey[key]:,})" if survey else text

        table.add_row(
            f"{row['width']:g}",
            str(row["epochs"]),
            beside(f"{row['parameters']:,}", "parameters"),
            *(beside(f"{100 * row[f'{name}_accuracy']:.2f}", name) for name in ("plain", "distilled", "int8")),
            beside(f"{row['size_bytes'] / 1024:.0f}", "size_kb"),
            beside(f"{row['int8_bytes'] / 1024:.0f}", "int8_kb"),
        )
    return table


def benchmark(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Do all of it, or what is left of it."""
    work.mkdir(parents=True, exist_ok=True)
    if arguments.quick:
        data, widths, teacher = digits(work), (0.05, 0.25), 0.5
    else:
        data = cifar10(arguments.data, work, arguments.rows, arguments.validation)
        widths, teacher = tuple(arguments.widths), arguments.teacher
    rows = pq.read_metadata(data.rows).num_rows
    planned = work / "epochs.json"
    if not planned.exists():
        least = 2 if arguments.quick else arguments.least_epochs
        write_json(planned, plan_epochs(data, rows, teacher, widths, 60 * arguments.minutes, least))
    epochs = read_json(planned)

    began, worked = time.perf_counter(), time.process_time()
    exported = train_teacher(data, teacher, epochs["teacher"], work)
    right = evaluate(logits_of(load_export(exported), data.test), data.test["label"].to_numpy())
    soft, labelling_s = label(data, exported, work, arguments.threads)
    students = [measure(data, float(name), count, soft, work) for name, count in epochs.items() if name != "teacher"]
    return {
        "images": "handwritten digits" if arguments.quick else "CIFAR-10",
        "limit_minutes": arguments.minutes,
        "processor_minutes": (time.process_time() - worked) / 60,
        "minutes": (time.perf_counter() - began) / 60,
        "rows": rows,
        "labelled_by_teacher": rows,
        "labelling_s": labelling_s,
        "teacher": {"width": teacher, "epochs": epochs["teacher"], **right},
        "left_out": sorted(set(widths) - {float(name) for name in epochs if name != "teacher"}),
        "students": students,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with cifar10-train.parquet and cifar10-test.parquet")
    parser.add_argument("--quick", action="store_true", help="handwritten digits instead, about a minute")
    parser.add_argument(
        "--minutes", type=float, help="limit of all trainings together, of one core (240; 0.5 for --quick)"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="rows to learn from and to label")
    parser.add_argument("--validation", type=int, default=2_000, help="further rows that choose epochs")
    parser.add_argument("--widths", type=float, nargs="+", default=sorted(SURVEY), help="widths of the students")
    parser.add_argument("--teacher", type=float, default=1.4, help="width of the teacher")
    parser.add_argument("--least-epochs", type=int, default=4, help="a width that gets fewer is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="directory to work in, where a stopped run goes on")
    parser.add_argument("--json", type=Path, help="write machine, versions, command and figures to this file")
    arguments = parser.parse_args()
    if not arguments.quick and arguments.data is None:
        parser.error("--data DIR is needed, or --quick")
    arguments.minutes = arguments.minutes or (0.5 if arguments.quick else 240)
    torch.set_num_threads(arguments.threads)
    configure_logs("error", Console(stderr=True))
    about = machine(("torch", "onnxruntime", "apache-beam", "pyarrow"), threads=arguments.threads)
    if arguments.work is None:
        with tempfile.TemporaryDirectory() as work:
            results = benchmark(arguments, Path(work))
    else:
        results = benchmark(arguments, arguments.work)
    teacher = results["teacher"]
    console = Console(width=130)
    console.print(show(results["students"], f"{results['images']}, {results['rows']:,} rows"))
    console.print(
        f"Teacher of width {teacher['width']:g}, {teacher['epochs']} epochs: {100 * teacher['accuracy']:.2f} %; "
        f"{results['labelled_by_teacher']:,} rows labelled in {results['labelling_s']:.1f} s; "
        f"{results['processor_minutes']:.1f} minutes of the processor, limit of the trainings {results['limit_minutes']:g}; "
        f"left out: {results['left_out'] or 'none'}."
    )
    write(arguments.json, about, results)


if __name__ == "__main__":
    main()
