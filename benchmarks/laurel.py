"""Time and memory of the learned augmented residual, forward and backward, beside eager and compiled torch.

    python benchmarks/laurel.py                                   on this machine's processor
    python benchmarks/laurel.py --threads 1 --form int8           with the norm and rowwise quantisation in the same pass
    python benchmarks/laurel.py --device cuda --grid gpu --dtype bfloat16 --json benchmarks/results/laurel-h100.json

Every candidate computes alpha f + beta (x + (x A) B), its norm and its 8-bit values where the form asks for them, and the
gradients of everything. `of roofline` is the time that reading each operand and writing each result once would take at
the speed of a large copy, over the time taken; `peak MiB` is what a step needs beyond its operands, results included; on a
GPU `host ms` is how long Python takes to issue it.
`measuring/steps.py` says how it is timed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring.record import machine, write
from measuring.steps import Step, copy_speed, host_seconds, medians, peak_bytes
from torch import Tensor

from distilbeam.kernels.laurel import shapes
from distilbeam.kernels.laurel.bench import FORMS, Problem, backward, step
from distilbeam.kernels.laurel.shapes import Shape

EIGHT_BITS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}


GRIDS = {"dry": shapes.DRY, "quick": shapes.QUICK, "cpu": shapes.CPU, "gpu": shapes.GPU, "gpu-all": shapes.GPU_ALL}


def formula(form: str) -> Callable[..., tuple[Tensor, ...]]:
    """Write the operation as one would in torch."""

    def compute(f: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, down: Tensor, up: Tensor, *norm: Tensor):
        total = alpha * f + beta * (x + (x @ down.to(x.dtype)) @ up.to(x.dtype))
        if form == "sum":
            return (total,)
        normed = torch.nn.functional.rms_norm(total, total.shape[-1:], norm[0].to(total.dtype), eps=1e-6)
        if form == "norm":
            return total, normed
        dtype, largest = EIGHT_BITS[form]
        scale = normed.detach().abs().amax(dim=1, keepdim=True).float() / largest
        scaled = (normed.detach() / scale).clamp(-largest, largest)
        return total, normed, (scaled.round() if form == "int8" else scaled).to(dtype), scale

    return compute


def eager(problem: Problem) -> Step:
    """Run the formula operation by operation; the 8-bit values take no part in the backward pass."""
    compute = formula(problem.form)
    return lambda: backward(compute(*problem.leaves), problem)


def compiled(problem: Problem) -> Step:
    """Compile the formula."""
    compute = torch.compile(formula(problem.form), dynamic=False)
    return lambda: backward(compute(*problem.leaves), problem)


def ours(implementation: str | None) -> Callable[[Problem], Step]:
    """Make a candidate of one of our implementations."""
    return lambda problem: step(problem, implementation)


CANDIDATES: dict[str, Callable[[Problem], Step]] = {
    "distilbeam": ours(None),
    "distilbeam chunked": ours("chunked"),
    "distilbeam triton": ours("triton"),
    "distilbeam pipelined": ours("pipelined"),
    "torch eager": eager,
    "torch.compile": compiled,
}


def measured_peak(name: str, shape: Shape, arguments: argparse.Namespace) -> int:
    """Measure a candidate's peak memory in a process of its own."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("device", "dtype", "threads", "form")]
    sizes = f"{shape.rows},{shape.dim},{shape.rank}"
    command = [sys.executable, __file__, *options, "--memory-of", name, "--shape", sizes]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def measure(shape: Shape, arguments: argparse.Namespace, bandwidth: float) -> list[dict[str, object]]:
    """Run all candidates on a shape."""
    torch.compiler.reset()  # many recompilations would end in eager execution
    problem = Problem(shape, arguments.form, arguments.device, getattr(torch, arguments.dtype))
    steps: dict[str, Step] = {}
    rows: list[dict[str, object]] = []
    for name, build in CANDIDATES.items():
        if name in arguments.without:
            continue
        try:
            take = build(problem)
            take()
        except Exception as e:  # noqa: BLE001 - a peer's or a compiler's fault costs its own figures alone
            reason = (str(e).splitlines() or [type(e).__name__])[0][:110]
            rows.append({"shape": str(shape), "candidate": name, "left out": reason})
        else:
            steps[name] = take
    bound = problem.least_bytes() / bandwidth
    found = []
    for name, taken in medians(steps, arguments.device, arguments.repeats).items():
        figures: dict[str, object] = {"ms": round(1e3 * taken, 3), "of roofline": round(bound / taken, 3)}
        figures["least MiB moved"] = round(problem.least_bytes() / 2**20, 1)
        on_gpu = arguments.device == "cuda"
        if on_gpu:
            figures["host ms"] = round(1e3 * host_seconds(steps[name]), 3)
        if not arguments.no_memory:
            peak = peak_bytes(steps[name], "cuda") if on_gpu else measured_peak(name, shape, arguments)
            figures["peak MiB"] = round(peak / 2**20, 1)
        found.append({"shape": str(shape), "candidate": name, **figures})
    return found + rows


def main() -> None:
    """Parse the command line, measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="cpu")
    parser.add_argument("--form", choices=FORMS, default="sum")
    parser.add_argument("--quick", action="store_true", help="small shapes, five rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=list(CANDIDATES)[1:], metavar="NAME", help="leave these out"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        shape = Shape(*map(int, arguments.shape.split(",")))
        problem = Problem(shape, arguments.form, arguments.device, getattr(torch, arguments.dtype))
        print(peak_bytes(CANDIDATES[arguments.memory_of](problem), arguments.device))
        return
    if arguments.quick:
        arguments.grid, arguments.repeats = "quick", 5
    bandwidth = copy_speed(arguments.device)
    about = machine(
        ("torch", "triton"),
        threads=arguments.threads,
        copy_GB_s=round(bandwidth / 1e9, 1),
        gpu=torch.cuda.get_device_name() if arguments.device == "cuda" else None,
    )
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows = []
    for shape in GRIDS[arguments.grid]:
        for row in measure(shape, arguments, bandwidth):
            print(" | ".join(str(v) if k in ("shape", "candidate") else f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
        write(arguments.json, about, rows)


if __name__ == "__main__":
    main()
