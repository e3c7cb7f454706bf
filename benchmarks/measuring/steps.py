"""Time and memory of steps forward and backward, and the machine's own speeds to hold them against.

Candidates take their steps in turn, round after round, so that what else the machine does hits all of them; the figure is
the median of the rounds. On a CPU it is processor time over threads, because the machine may have other work. On a GPU it
is the time between two events after the cache was overwritten, so often that the step's kernels wait in the queue: what
the host needs to issue them is not in it, as in a training whose GPU is busy, and is given apart.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Step = Callable[[], object]
CACHE_BYTES = 1 << 28  # more than any GPU's second-level cache
OVERWRITTEN = 64  # times: some milliseconds, longer than the host takes for any step


def seconds(step: Step, device: str) -> float:
    """Time one step."""
    if device == "cuda":
        cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        for _ in range(OVERWRITTEN):
            cache.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    used = time.process_time()
    step()
    return (time.process_time() - used) / torch.get_num_threads()


def host_seconds(step: Step, repeats: int = 5) -> float:
    """Give the median time that a step's Python takes before the GPU has done any of it."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def medians(steps: Mapping[str, Step], device: str, repeats: int) -> dict[str, float]:
    """Time every candidate's step in turn.

    Args:
      steps: from a candidate's name to its step, each of which has run before.
      device: `cpu` or `cuda`.
      repeats: rounds.

    Returns:
      The median of each candidate's seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return {name: statistics.median(column) for name, column in times.items()}


def peak_bytes(step: Step, device: str) -> int:
    """Measure what a step needs beyond what is held before it; on a CPU by the growth of the resident set.

    On a CPU the process should do nothing else and return freed memory at once (MALLOC_TRIM_THRESHOLD_=0 and
    MALLOC_MMAP_THRESHOLD_=65536 in its environment).
    """
    step()  # compiled code and workspaces are there from now on
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def copy_speed(device: str) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.zeros_like(source)
    return 8 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(5))


def product_speed(device: str, dtype: torch.dtype) -> float:
    """Measure the operations per second of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: square @ square, device) for _ in range(5))


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
