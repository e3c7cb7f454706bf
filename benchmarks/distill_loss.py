"""Time and memory of the distillation losses beside their peers, forward and backward, in one run.

    python benchmarks/distill_loss.py                     the CPU target: 512 rows, 256 features, 32,000 classes, top 64
    python benchmarks/distill_loss.py --grid classifier   logits of 10 to 1,000 classes
    python benchmarks/distill_loss.py --grid extreme      300,000 classes, top 50
    python benchmarks/distill_loss.py --grid language --device cuda --dtype bfloat16      Liger's own shapes

Every candidate runs the same step in turn, round after round, so that what else the machine does hits all of them; the
figure is the median of the rounds, by the clock and, for machines with other work, in processor time. Peak memory is
what a step needs beyond its inputs: on a CPU the growth of the resident set in a process of its own, on a GPU the
allocator's. The roofline is the larger of operations over the speed of a large matrix product and bytes over the speed
of a large copy, both measured in the same run, on a CPU all of it in processor time. Peers that are not installed or
cannot run are listed with the reason. Liger and cut-cross-entropy solve neighbouring problems: Liger also computes the
teacher's last layer, which it has no way around, and cut-cross-entropy takes hard labels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring.record import machine, write
from torch import Tensor
from torch.nn import functional

from distilbeam.kernels import TopKLabels, distill_loss, linear_distill_loss

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """One problem: the last layer and the loss, or, without features, the loss of given logits."""

    name: str
    rows: int
    features: int | None
    classes: int
    kept: int


GRIDS = {
    "target": [Shape("512x256x32k", 512, 256, 32_000, 64)],
    "classifier": [
        Shape(f"{rows}x{classes}", rows, None, classes, min(10, classes))
        for rows in (256, 4096)
        for classes in (10, 100, 1000)
    ],
    "language": [Shape(f"{rows}x4096x128k", rows, 4096, 128_256, 64) for rows in (1024, 2048, 4096, 8192)],
    "extreme": [Shape("256x128x300k", 256, 128, 300_000, 50)],
    "quick": [Shape("64x32x2k", 64, 32, 2_000, 16), Shape("256x100", 256, None, 100, 10)],
}
SHAPES = {shape.name: shape for grid in GRIDS.values() for shape in grid}


class Problem:
    """The tensors of a shape."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def random(*size: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*size, generator=generator)).to(device=device, dtype=dtype)

        features = shape.features or 0
        scale = features**-0.5 if features else 1.0
        self.leaves = (
            [random(shape.rows, shape.classes)]
            if not features
            else [
                random(shape.rows, features),
                random(shape.classes, features, scale=scale),
            ]
        )
        self.teacher = (
            [random(shape.rows, features), random(shape.classes, features, scale=3 * scale)] if features else []
        )
        teacher_logits = (
            self.teacher[0] @ self.teacher[1].T if features else random(shape.rows, shape.classes, scale=3.0)
        )
        logprobs = teacher_logits.float().log_softmax(1)
        top = logprobs.topk(shape.kept, dim=1)
        self.labels = TopKLabels(top.values, top.indices, torch.log1p(-top.values.exp().sum(1).clamp(max=1 - 1e-6)))
        self.dense = logprobs if logprobs.numel() <= 1 << 28 else None
        self.hard = top.indices[:, 0].contiguous()
        for leaf in self.leaves:
            leaf.requires_grad_()


def ours(implementation: str) -> Callable[[Problem], Step]:
    """Make a candidate of one of our implementations."""

    def build(problem: Problem) -> Step:
        options = {"objective": "tail", "implementation": implementation}
        if problem.shape.features is None:
            return lambda: distill_loss(*problem.leaves, problem.labels, **options)
        return lambda: linear_distill_loss(*problem.leaves, None, problem.labels, **options)

    return build


def logits_of(problem: Problem) -> Tensor:
    """Compute the logits where the problem has a layer."""
    return problem.leaves[0] if problem.shape.features is None else functional.linear(*problem.leaves)


def dense_kl(problem: Problem) -> Step:
    """KL to the teacher's full distribution, as PyTorch's own functions give it."""
    if problem.dense is None:
        raise NotImplementedError("the teacher's full distribution does not fit")
    return lambda: functional.kl_div(
        logits_of(problem).float().log_softmax(1), problem.dense, reduction="batchmean", log_target=True
    )


def sparse_tail(logits: Tensor, logprobs: Tensor, classes: Tensor, tail: Tensor) -> Tensor:
    """The k + 1 bucket loss as one would write it."""
    kept = logits.float().log_softmax(1).gather(1, classes)
    rest = torch.log(-torch.expm1(kept.logsumexp(1).clamp(max=-1e-7)))
    return ((logprobs.exp() * (logprobs - kept)).sum(1) + tail.exp() * (tail - rest)).mean()


def eager_sparse(problem: Problem) -> Step:
    """Eager PyTorch on the sparse labels."""
    labels = problem.labels
    return lambda: sparse_tail(logits_of(problem), labels.logprobs, labels.classes, labels.tail_logmass)


def compiled_sparse(problem: Problem) -> Step:
    """torch.compile of the same."""
    labels = problem.labels
    compiled = torch.compile(
        lambda: sparse_tail(logits_of(problem), labels.logprobs, labels.classes, labels.tail_logmass)
    )
    return lambda: compiled()


def liger_chunked(problem: Problem) -> Step:
    """Liger's chunked loss as shipped: forward KL (beta = 0), compiled, no hard labels."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    if problem.shape.features is None:
        raise NotImplementedError("it has no form for given logits")
    options = (problem.hard, None, None, 0.0, 1.0, 0.0)

    def step() -> Tensor:
        out = LigerFusedLinearJSDFunction.apply(*problem.leaves, *problem.teacher, *options)
        return out[0] if isinstance(out, tuple) else out

    return step


def liger_triton(problem: Problem) -> Step:
    """Liger's Triton KL on dense labels."""
    from liger_kernel.transformers import LigerKLDIVLoss

    if not problem.leaves[0].is_cuda:
        raise NotImplementedError("it needs a CUDA device")
    loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda: loss(logits_of(problem).float().log_softmax(1), problem.dense)


def cut_cross_entropy(problem: Problem) -> Step:
    """Cut cross-entropy, on hard labels."""
    from cut_cross_entropy import linear_cross_entropy

    if problem.shape.features is None:
        raise NotImplementedError("it has no form for given logits")
    name = "cce" if problem.leaves[0].is_cuda else "torch_compile"
    return lambda: linear_cross_entropy(*problem.leaves, problem.hard, impl=name)


def trl(problem: Problem) -> Step:
    """TRL's generalised divergence on dense labels (beta = 0)."""
    from trl.experimental.gkd import GKDTrainer

    if problem.dense is None:
        raise NotImplementedError("the teacher's full distribution does not fit")
    function = GKDTrainer.generalized_jsd_loss
    return lambda: function(logits_of(problem)[None], problem.dense[None], beta=0.0)


CANDIDATES: dict[str, Callable[[Problem], Step]] = {
    "distilbeam chunked": ours("chunked"),
    "distilbeam triton": ours("triton"),
    "distilbeam reference": ours("reference"),
    "torch dense KL": dense_kl,
    "torch sparse": eager_sparse,
    "torch.compile sparse": compiled_sparse,
    "Liger chunked": liger_chunked,
    "Liger Triton": liger_triton,
    "cut-cross-entropy": cut_cross_entropy,
    "TRL": trl,
}


def run_once(problem: Problem, step: Step) -> tuple[float, float]:
    """Take a step forward and backward; return its seconds by the clock and on the processors."""
    for leaf in problem.leaves:
        leaf.grad = None
    cuda = problem.leaves[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start, used = time.perf_counter(), time.process_time()
    step().backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - used


def peak_bytes(problem: Problem, step: Step) -> int:
    """Measure what a step needs beyond what is held before it."""
    run_once(problem, step)  # compiled code and workspaces are there from now on
    for leaf in problem.leaves:
        leaf.grad = None
    if problem.leaves[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(problem, step)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run_once(problem, step)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measured_peak(name: str, shape: Shape, arguments: argparse.Namespace) -> int:
    """Measure a candidate's peak memory, on a CPU in a process of its own."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("device", "dtype", "threads")]
    command = [sys.executable, __file__, *options, "--memory-of", name, "--shape", shape.name]
    # freed memory goes back to the system at once, so that one step's garbage does not hide the next one's needs
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def speeds(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure bytes per second of a copy and operations per second of a matrix product."""
    big = torch.empty(1 << 26, device=device)
    square = torch.randn(2048, 2048, device=device).to(dtype)
    target = torch.empty_like(big)

    def seconds(work: Callable[[], object]) -> float:
        def timed() -> float:
            start, used = time.perf_counter(), time.process_time()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
                return time.perf_counter() - start
            return (time.process_time() - used) / torch.get_num_threads()

        return min(timed() for _ in range(5))

    return 8 * big.numel() / seconds(lambda: target.copy_(big)), 2 * 2048**3 / seconds(lambda: square @ square)


def roofline_ms(shape: Shape, itemsize: int, bandwidth: float, operations: float) -> float:
    """Bound a step's time from below: logits read and gradients written once, or three products of the layer."""
    features = shape.features
    if features is None:
        return 1e3 * 2 * itemsize * shape.rows * shape.classes / bandwidth
    moved = 2 * itemsize * features * (shape.rows + shape.classes)
    return 1e3 * max(moved / bandwidth, 6 * shape.rows * features * shape.classes / operations)


def measure(
    shape: Shape, arguments: argparse.Namespace, bandwidth: float, operations: float
) -> list[dict[str, object]]:
    """Run all candidates on a shape."""
    dtype = getattr(torch, arguments.dtype)
    problem = Problem(shape, arguments.device, dtype)
    steps: dict[str, Step] = {}
    rows: list[dict[str, object]] = []
    for name, build in CANDIDATES.items():
        try:
            steps[name] = build(problem)
            run_once(problem, steps[name])
        except (ImportError, NotImplementedError, RuntimeError, torch.OutOfMemoryError) as e:
            steps.pop(name, None)
            rows.append({"shape": shape.name, "candidate": name, "left out": str(e).splitlines()[0][:110]})
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            times[name].append(run_once(problem, step))
    bound = roofline_ms(shape, problem.leaves[0].element_size(), bandwidth, operations)
    measured = []
    for name, step in steps.items():
        clock, processors = (1e3 * statistics.median(column) for column in zip(*times[name], strict=True))
        busy = clock if arguments.device == "cuda" else processors / arguments.threads
        figures = {"ms": round(clock, 2), "processor ms": round(processors, 2), "of roofline": round(bound / busy, 3)}
        if not arguments.no_memory:
            peak = peak_bytes(problem, step) if arguments.device == "cuda" else measured_peak(name, shape, arguments)
            figures["peak MiB"] = round(peak / 2**20, 1)
        measured.append({"shape": shape.name, "candidate": name, **figures})
    return measured + rows


def main() -> None:
    """Parse the command line, measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="target")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        problem = Problem(SHAPES[arguments.shape], arguments.device, getattr(torch, arguments.dtype))
        print(peak_bytes(problem, CANDIDATES[arguments.memory_of](problem)))
        return
    if arguments.quick:
        arguments.grid, arguments.repeats = "quick", 3
    bandwidth, operations = speeds(arguments.device, getattr(torch, arguments.dtype))
    rows = [row for shape in GRIDS[arguments.grid] for row in measure(shape, arguments, bandwidth, operations)]
    about = machine(
        ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl"),
        threads=arguments.threads,
        copy_GB_s=round(bandwidth / 1e9, 1),
        product_Gop_s=round(operations / 1e9, 1),
        gpu=torch.cuda.get_device_name() if arguments.device == "cuda" else None,
    )
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    for row in rows:
        print(
            " | ".join(f"{value}" if key in ("shape", "candidate") else f"{key} {value}" for key, value in row.items())
        )
    write(arguments.output, about, rows)


if __name__ == "__main__":
    main()
