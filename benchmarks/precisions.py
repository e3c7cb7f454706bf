"""A training's step of every kind of student in every precision, beside the plain one: time, peak memory, what ran in what.

    python benchmarks/precisions.py --quick                                    # two students, three rounds, no peaks
    python benchmarks/precisions.py --threads 1 --json benchmarks/results/precisions-cpu.json
    python benchmarks/precisions.py --device cuda --json FILE

Plain is the same student in float32 with whole logits. In each precision the last layer and the loss are taken apart and
together; fp8 and int8 convert every layer of a size that they take (`precision_gate = "sizes"`), which on a processor is
for their correctness and no gain. Times are medians of rounds taken in turn; peaks are what a step needs beyond what is
held before it, on a CPU in a process for each student.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring.record import machine, write
from measuring.steps import medians, peak_bytes
from measuring.student_steps import StudentStep, peaks_alone, student_step

from distilbeam.student.training.config import TrainConfig

ROWS, CLASSES, VOCABULARY = 128, 8_000, 10_000
PRECISIONS = ("fp32", "bf16", "fp8", "int8")
FORMS = [
    (precision, way) for precision in PRECISIONS for way in ("apart", "together")
]  # the first one is the plain one
LEARNED = {"residual": "laurel-rw+lr", "norm": "rms"}


class Student(NamedTuple):
    """A student's configuration, and the shape of one example; of token ids where it has one axis and no numbers."""

    configuration: dict[str, Any]
    shape: tuple[int, ...]
    tokens: bool = False

    def inputs(self) -> torch.Tensor:
        """Draw the rows of a step."""
        size = (ROWS, *self.shape)
        return torch.randint(1, VOCABULARY, size) if self.tokens else torch.randn(size)


STUDENTS = {
    "mlp": Student({"kind": "mlp", "hidden": [256, 256, 256], **LEARNED}, (256,)),
    "text": Student({"kind": "text", "dim": 256, "hidden": [256, 256], **LEARNED}, (64,), tokens=True),
    "transformer": Student({"kind": "transformer", "dim": 256, "heads": 4, **LEARNED}, (32,), tokens=True),
    "cnn": Student({"kind": "cnn", "width": 0.5}, (3, 32, 32)),
    "resnet": Student({"kind": "resnet", "depth": 8, "residual": "laurel-rw"}, (3, 32, 32)),
}


def make_step(name: str, precision: str, way: str, device: str) -> StudentStep:
    """Build a student's step."""
    student = STUDENTS[name]
    training = TrainConfig.model_validate(
        {"batch_size": ROWS, "precision": precision, "precision_gate": "sizes", "last_layer": way}
    )
    return student_step(student.configuration, student.inputs(), CLASSES, training, torch.device(device))


def peaks_of(name: str, options: argparse.Namespace) -> list[int]:
    """Measure the steps' peaks, on a CPU in a process of their own that returns freed memory at once."""
    if options.device == "cuda" or options.peaks:
        return [peak_bytes(make_step(name, *form, options.device).take, options.device) for form in FORMS]
    return peaks_alone(__file__, [f"--threads={options.threads}", "--peaks", "--students", name])


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a student in each precision, its last layer apart from the loss and together with it."""
    made = {" ".join(form): make_step(name, *form, options.device) for form in FORMS}
    for step in made.values():
        step.take()
    times = medians({form: step.take for form, step in made.items()}, options.device, options.repeats)
    peaks = [] if options.no_memory else peaks_of(name, options)
    rows = []
    for number, (form, step) in enumerate(made.items()):
        precision, way = FORMS[number]
        row: dict[str, Any] = {"student": name, "precision": precision, "last layer": way}
        row["ms"] = round(1e3 * times[form], 3)
        row["times plain's speed"] = round(times[" ".join(FORMS[0])] / times[form], 2)
        if peaks:
            row["peak MiB"] = round(peaks[number] / 2**20, 1)
            row["of plain's peak"] = round(peaks[number] / peaks[0], 3)
        rows.append({**row, "ran": step.ran})
    return rows


def main() -> None:
    """Measure, print a line for each step, write the figures student by student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="mlp and cnn, three rounds, no peaks")
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peaks, which take a process for each student"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("distilbeam").setLevel(logging.ERROR)  # what a training says is in the figures
    if options.peaks:
        print(*peaks_of(options.students[0], options))
        return
    if options.quick:
        options.students, options.repeats, options.no_memory = ["mlp", "cnn"], 3, True
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = machine(("torch", "triton"), threads=options.threads, gpu=gpu)
    rows: list[dict[str, Any]] = []
    for name in options.students:
        for row in measure(name, options):
            rows.append(row)
            print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write(options.json, about, rows)


if __name__ == "__main__":
    main()
