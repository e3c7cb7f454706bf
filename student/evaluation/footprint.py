"""The footprint of a student where it runs: latency and memory, measured in a process that holds nothing else.

    python -m distilbeam.student.evaluation.footprint run/students/round=003
    python -m distilbeam.student.evaluation.footprint run/exports/int8 --threads 2

The directory holds a student or an export of one. A fresh process starts with neither training data nor the allocator's
leftovers, so that its peak memory is the model's and its runtime's; an ONNX export is measured without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (1, 64)
WARM_UP = 5
TIME_LIMIT_S = 600


def measure(directory: str | Path, threads: int = 1, repeats: int = 50) -> dict[str, float]:
    """Measure a student or an export in a fresh process.

    Args:
      directory: of `save_student` or `export_student`.
      threads: most threads of one operation.
      repeats: timed calls per batch size, after five untimed ones.

    Returns:
      `latency_ms_batch1`, `latency_ms_batch64` (medians, milliseconds) and `..._p95` (95th percentiles);
      `peak_memory_bytes`, the most that the process held in memory, and `memory_bytes`, how much of that came after its
      interpreter and numpy were loaded: the runtime, the model and its activations.

    Raises:
      RuntimeError: the process failed; the message has its last line.
    """
    from distilbeam.student.trust import trusted  # the process that measures does not load it

    arguments = [str(directory), "--threads", str(threads), "--repeats", str(repeats)]
    arguments += [f"--trust={name}" for name in trusted()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # factories that this process finds
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [sys.executable, "-m", "distilbeam.student.evaluation.footprint", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{directory} could not be measured: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}"
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def latency_ms(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Time a call: median and 95th percentile in milliseconds, warm."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    median, late = np.quantile(times[WARM_UP:], (0.5, 0.95))
    return float(median), float(late)


def named_latencies(call: Callable[[int], Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time batches of 1 and 64; `call` makes the call to time from the number of rows."""
    found: dict[str, float] = {}
    for rows in BATCHES:
        median, late = latency_ms(call(rows), repeats)
        found |= {f"latency_ms_batch{rows}": median, f"latency_ms_batch{rows}_p95": late}
    return found


def peak_memory_bytes() -> int:
    """Return the most memory that this process held at once; what its parent held does not count."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss is inherited from a parent that forked
        lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return 1024 * int(lines[0].split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measured(directory: Path, threads: int, repeats: int) -> dict[str, float]:
    before = peak_memory_bytes()
    call = _call_of_export(directory, threads) if (directory / "export.json").exists() else _call_of_student(directory)
    latencies = named_latencies(call, repeats)
    peak = peak_memory_bytes()
    return {**latencies, "peak_memory_bytes": peak, "memory_bytes": peak - before}


def _call_of_export(directory: Path, threads: int) -> Callable[[int], Callable[[], object]]:
    from distilbeam.student.export.runtimes import open_runner

    description = json.loads((directory / "export.json").read_text())
    run = open_runner(directory / description["file"], threads)

    def call(rows: int) -> Callable[[], object]:
        inputs = np.zeros((rows, *description["input_shape"]), description["input_dtype"])
        return lambda: run(inputs)

    return call


def _call_of_student(directory: Path) -> Callable[[int], Callable[[], object]]:
    import torch

    from distilbeam.student.checkpoint import load_student

    student = load_student(directory)
    forward: Any = torch.inference_mode()(student.module.forward)

    def call(rows: int) -> Callable[[], object]:
        inputs = student.zeros(rows)
        return lambda: forward(inputs)

    return call


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a student or an export of one")
    parser.add_argument("--threads", type=int, default=1, help="most threads of one operation")
    parser.add_argument("--trust", action="append", default=[], help="module whose code the directory may call")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls per batch size")
    arguments = parser.parse_args()
    if arguments.trust:
        from distilbeam.student.trust import trust

        trust(*arguments.trust)
    print(json.dumps(_measured(arguments.directory, arguments.threads, arguments.repeats)))


if __name__ == "__main__":
    _main()
