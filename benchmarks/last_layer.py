"""A training's step with the last layer and the loss in one operation, beside the same step with whole logits.

    python benchmarks/last_layer.py --quick                                    # half a minute
    python benchmarks/last_layer.py --threads 1 --json benchmarks/results/last_layer-cpu.json
    python benchmarks/last_layer.py --device cuda --precision bf16 --grid gpu --json FILE
    python benchmarks/last_layer.py --threads 2 --shape 512x256x32000 --buffers 8 16 24 64       # which buffer pays

The step is the trainer's own (`step_loss`, forward and backward, without the optimizer) of an RMSNorm mlp with learned
residuals, whose last layer has the given sizes. `table` says what `training.last_layer = "table"` chooses there. Times are
medians of rounds taken in turn; `--buffers` adds `together` with buffers of other sizes, in MiB, on a CPU; peaks are what a
step needs beyond what is held before it, on a CPU in a process for each shape.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring.record import machine, write
from measuring.steps import Step, medians, peak_bytes
from measuring.student_steps import StudentStep, peaks_alone, student_step

from distilbeam.kernels.linear_distillation import chunked
from distilbeam.student.training.config import TrainConfig

WAYS = ("apart", "together")


class Shape(NamedTuple):
    """Rows of a step, features and classes of the last layer; labels keep ten classes of a row."""

    rows: int
    features: int
    classes: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


GRIDS = {
    "dry": (Shape(16, 16, 100),),
    "quick": (Shape(64, 64, 1_000), Shape(256, 64, 8_000)),
    "cpu": tuple(
        Shape(rows, features, classes)
        for rows in (64, 512)
        for features in (64, 256, 1024)
        for classes in (100, 1_000, 8_000, 32_000)
    ),
    "gpu": tuple(
        Shape(rows, features, classes)
        for rows, features, classes in (
            (4096, 256, 32_000),
            (4096, 1024, 32_000),
            (4096, 4096, 128_256),
            (16_384, 1024, 128_256),
        )
    ),
}


def make_step(shape: Shape, way: str, options: argparse.Namespace) -> StudentStep:
    """Give the step of a student whose last layer has the shape."""
    student = {"kind": "mlp", "hidden": [shape.features] * 2, "residual": "laurel-rw+lr", "norm": "rms"}
    training = TrainConfig(batch_size=shape.rows, precision=options.precision, last_layer=way)
    inputs = torch.randn(shape.rows, shape.features)
    return student_step(student, inputs, shape.classes, training, torch.device(options.device))


def in_buffer(step: Step, mebibytes: int) -> Step:
    """Give the step with a buffer of that size for its logits."""

    def sized() -> None:
        kept, chunked.BUFFER_ELEMENTS = chunked.BUFFER_ELEMENTS, mebibytes << 18
        try:
            step()
        finally:
            chunked.BUFFER_ELEMENTS = kept

    return sized


def steps_of(shape: Shape, options: argparse.Namespace) -> dict[str, Step]:
    """Name the ways, and their steps."""
    steps = {way: make_step(shape, way, options).take for way in WAYS}
    steps |= {f"together in {size} MiB": in_buffer(steps["together"], size) for size in options.buffers}
    return steps


def peaks_of(shape: Shape, options: argparse.Namespace) -> dict[str, int]:
    """Measure the steps' peaks, on a CPU in a process of their own that returns freed memory at once."""
    steps = steps_of(shape, options)
    if options.device == "cuda" or options.peaks:
        return {way: peak_bytes(step, options.device) for way, step in steps.items()}
    arguments = [f"--precision={options.precision}", f"--threads={options.threads}", "--peaks", f"--shape={shape}"]
    found = peaks_alone(__file__, [*arguments, "--buffers", *map(str, options.buffers)])
    return dict(zip(steps, found, strict=True))


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the ways on a shape."""
    steps = steps_of(shape, options)
    for step in steps.values():
        step()
    times = medians(steps, options.device, options.repeats)
    row: dict[str, Any] = {"shape": str(shape), "precision": options.precision}
    row |= {f"{way} ms": round(1e3 * taken, 3) for way, taken in times.items()}
    row["speed"] = round(times["apart"] / times["together"], 3)
    if not options.no_memory:
        peaks = peaks_of(shape, options)
        row |= {f"{way} peak MiB": round(peak / 2**20, 1) for way, peak in peaks.items()}
        row["memory"] = round(peaks["together"] / max(1, peaks["apart"]), 3)
    row["table"] = "together" if make_step(shape, "table", options).together else "apart"
    return row


def main() -> None:
    """Measure, print a line for each shape, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds, no peaks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp8", "int8"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peaks, which take a process for each shape"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--buffers", nargs="*", type=int, default=[], metavar="MIB", help="other sizes of the buffer")
    parser.add_argument("--shape", help="rows x features x classes, like 512x256x32000, instead of a grid")
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = GRIDS["quick" if options.quick else options.grid]
    if options.shape:
        shapes = (Shape(*map(int, options.shape.split("x"))),)
    if options.peaks:
        print(*peaks_of(shapes[0], options).values())
        return
    if options.quick:
        options.repeats, options.no_memory = 3, True
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = machine(("torch", "triton"), threads=options.threads, gpu=gpu)
    rows = []
    for shape in shapes:
        rows.append(measure(shape, options))
        print(" | ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        write(options.json, about, rows)


if __name__ == "__main__":
    main()
