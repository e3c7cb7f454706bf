"""Time and memory of the distillation losses beside their peers, forward and backward, in one run.

    python benchmarks/distill_loss.py                     the CPU target: 512 rows, 256 features, 32,000 classes, top 64
    python benchmarks/distill_loss.py --grid classifier   logits of 10 to 1,000 classes
    python benchmarks/distill_loss.py --grid extreme      300,000 classes, top 50
    python benchmarks/distill_loss.py --grid language --device cuda --dtype bfloat16      Liger's own shapes
    python benchmarks/distill_loss.py --grid all --device cuda --dtype bfloat16 --seconds 480 --json FILE

Every candidate takes a step in every round, in changing order; the figure is the median (see measuring/steps.py). Peak
memory is what a step needs beyond its inputs, on a CPU in a process of its own. `of roofline` is the larger of bytes over
the speed of a large copy and operations over the speed of a large matrix product, both measured in the same run, over the
time taken; on a GPU `host ms` is how long Python takes to issue the step. Peers that are not installed or cannot run are
listed with the reason. Some solve neighbouring problems: those that compare with the teacher's full distribution need C
numbers per example where a label has k; Liger's chunked loss also computes the teacher's last layer, which it has no way
around; cut-cross-entropy takes hard labels. `bf16`, `int8` and `fp8` round the layer, where it is not in bfloat16 already,
and compute another loss within a bound. The other divergences (`distilbeam jsd`, ...) have their time over that of forward KL, `of
tail`; `--without peers` leaves out all but them. The last line of every shape names the fastest of ours and says whether the
implementation that is chosen by itself was that.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from measuring.record import machine, write
from measuring.steps import Step, copy_speed, host_seconds, peak_bytes, product_speed, seconds
from torch import Tensor
from torch.nn import functional

from distilbeam.kernels.distillation import bench as of_logits
from distilbeam.kernels.distillation import shapes as logits_shapes
from distilbeam.kernels.distillation.bench import LogitsProblem, Work
from distilbeam.kernels.distillation.targets import OTHER_DIVERGENCES, Objective
from distilbeam.kernels.linear_distillation import bench as of_layer
from distilbeam.kernels.linear_distillation import shapes as layer_shapes
from distilbeam.kernels.linear_distillation.bench import LayerProblem
from distilbeam.kernels.linear_distillation.precision import Precision

Problem = LogitsProblem | LayerProblem
Loss = Callable[[], Tensor]
Shape = logits_shapes.Shape | layer_shapes.Shape

GRIDS: dict[str, tuple[Shape, ...]] = {
    "target": layer_shapes.TARGET,
    "classifier": logits_shapes.CLASSIFIER,
    "language": (*logits_shapes.LANGUAGE, *layer_shapes.LANGUAGE),
    "extreme": (*logits_shapes.EXTREME, *layer_shapes.EXTREME),
    "decide": (*logits_shapes.DECIDE, *layer_shapes.DECIDE),
    "quick": (*layer_shapes.QUICK, *logits_shapes.QUICK),
    "dry": (*layer_shapes.DRY, *logits_shapes.DRY),
}
GRIDS["all"] = tuple(shape for name in ("language", "extreme", "target", "classifier") for shape in GRIDS[name])
SHAPES = {str(shape): shape for grid in GRIDS.values() for shape in grid}


def make_problem(shape: Shape, device: str, dtype: torch.dtype) -> Problem:
    """Draw the tensors of a shape."""
    return (
        LogitsProblem(shape, device, dtype)
        if isinstance(shape, logits_shapes.Shape)
        else LayerProblem(shape, device, dtype)
    )


def ours(implementation: str | None, *, dense: bool = False) -> Callable[[Problem], Loss]:
    """Make a candidate of one of our implementations."""

    def build(problem: Problem) -> Loss:
        if isinstance(problem, LogitsProblem):
            return of_logits.step(problem, implementation, dense=dense)
        if dense:
            raise NotImplementedError("the label of a layer's problem is sparse")
        if implementation in ("one_kernel", "two_kernels"):
            raise NotImplementedError("it takes given logits")
        return of_layer.step(problem, implementation)

    return build


def of_last_layer(precision: Precision | None, implementation: str | None = None) -> Callable[[Problem], Loss]:
    """Make a candidate of the last layer alone, which may round inputs and weight."""

    def build(problem: Problem) -> Loss:
        if isinstance(problem, LogitsProblem):
            raise NotImplementedError("given logits have no layer")
        return of_layer.step(problem, implementation, precision)

    return build


def of_objective(objective: Objective) -> Callable[[Problem], Loss]:
    """Make a candidate of another divergence than forward KL, by the implementation that is chosen."""

    def build(problem: Problem) -> Loss:
        if isinstance(problem, LogitsProblem):
            return of_logits.step(problem, None, objective=objective)
        return of_layer.step(problem, None, objective=objective)

    return build


def logits_of(problem: Problem) -> Tensor:
    """Compute the logits where the problem has a layer."""
    return problem.leaves[0] if isinstance(problem, LogitsProblem) else functional.linear(*problem.leaves)


def full(problem: Problem) -> Tensor:
    """Give the teacher's full distribution."""
    if problem.dense is None:
        raise NotImplementedError("the teacher's full distribution does not fit")
    return problem.dense


def dense_kl(problem: Problem) -> Loss:
    """KL to the teacher's full distribution, as PyTorch's own functions give it."""
    target = full(problem)
    return lambda: functional.kl_div(
        logits_of(problem).float().log_softmax(1), target, reduction="batchmean", log_target=True
    )


def sparse_tail(logits: Tensor, logprobs: Tensor, classes: Tensor, tail: Tensor) -> Tensor:
    """The k + 1 bucket loss as one would write it."""
    kept = logits.float().log_softmax(1).gather(1, classes)
    rest = torch.log(-torch.expm1(kept.logsumexp(1).clamp(max=-1e-7)))
    return ((logprobs.exp() * (logprobs - kept)).sum(1) + tail.exp() * (tail - rest)).mean()


def eager_sparse(problem: Problem) -> Loss:
    """Eager PyTorch on the sparse labels."""
    labels = problem.labels
    return lambda: sparse_tail(logits_of(problem), labels.logprobs, labels.classes, labels.tail_logmass)


def compiled_sparse(problem: Problem) -> Loss:
    """torch.compile of the same."""
    labels = problem.labels
    compiled = torch.compile(
        lambda: sparse_tail(logits_of(problem), labels.logprobs, labels.classes, labels.tail_logmass), dynamic=False
    )
    return lambda: compiled()


def liger_chunked(problem: Problem) -> Loss:
    """Liger's chunked loss as shipped: forward KL (beta = 0), compiled, no hard labels."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    if isinstance(problem, LogitsProblem):
        raise NotImplementedError("it has no form for given logits")
    options = (problem.hard, None, None, 0.0, 1.0, 0.0)

    def step() -> Tensor:
        out = LigerFusedLinearJSDFunction.apply(*problem.leaves, *problem.teacher, *options)
        return out[0] if isinstance(out, tuple) else out

    return step


def liger_triton(problem: Problem) -> Loss:
    """Liger's Triton KL on dense labels."""
    from liger_kernel.transformers import LigerKLDIVLoss

    if not problem.leaves[0].is_cuda:
        raise NotImplementedError("it needs a CUDA device")
    loss, target = LigerKLDIVLoss(reduction="batchmean", log_target=True), full(problem)
    return lambda: loss(logits_of(problem).float().log_softmax(1), target)


def cut_cross_entropy(problem: Problem) -> Loss:
    """Cut cross-entropy, on hard labels."""
    from cut_cross_entropy import linear_cross_entropy

    if isinstance(problem, LogitsProblem):
        raise NotImplementedError("it has no form for given logits")
    name = "cce" if problem.leaves[0].is_cuda else "torch_compile"
    return lambda: linear_cross_entropy(*problem.leaves, problem.hard, impl=name)


def trl(problem: Problem) -> Loss:
    """TRL's generalised divergence on dense labels (beta = 0)."""
    from trl.experimental.gkd import GKDTrainer

    function, target = GKDTrainer.generalized_jsd_loss, full(problem)[None]
    return lambda: function(logits_of(problem)[None], target, beta=0.0)


CANDIDATES: dict[str, Callable[[Problem], Loss]] = {
    "distilbeam": ours(None),
    "distilbeam chunked": ours("chunked"),
    "distilbeam triton": ours("triton"),
    "distilbeam one kernel": ours("one_kernel"),
    "distilbeam two kernels": ours("two_kernels"),
    "distilbeam reference": ours("reference"),
    "distilbeam dense": ours(None, dense=True),
    "distilbeam dense, one kernel": ours("one_kernel", dense=True),
    "distilbeam in place": of_last_layer(None, "in_place"),
    "distilbeam in place, fp8": of_last_layer("fp8", "in_place"),
    "distilbeam bf16": of_last_layer("bf16"),
    "distilbeam int8": of_last_layer("int8"),
    "distilbeam fp8": of_last_layer("fp8"),
    **{f"distilbeam {objective}": of_objective(objective) for objective in OTHER_DIVERGENCES},
    "torch dense KL": dense_kl,
    "torch sparse": eager_sparse,
    "torch.compile sparse": compiled_sparse,
    "Liger chunked": liger_chunked,
    "Liger Triton": liger_triton,
    "cut-cross-entropy": cut_cross_entropy,
    "TRL": trl,
}
DIVERGENCES = tuple(f"distilbeam {objective}" for objective in OTHER_DIVERGENCES)
OURS = tuple(
    f"distilbeam {name}" for name in ("chunked", "triton", "one kernel", "two kernels", "in place", "reference")
)


def training_step(problem: Problem, loss: Loss) -> Step:
    """Give the step that is timed: forward and backward from no gradients."""

    def step() -> None:
        for leaf in problem.leaves:
            leaf.grad = None
        loss().backward()

    return step


def leaving_nothing(step: Step, problem: Problem) -> Step:
    """Give the step with its gradients forgotten at the end, so that the next one's count as its own."""

    def whole() -> None:
        step()
        for leaf in problem.leaves:
            leaf.grad = None

    return whole


def measured_peak(name: str, shape: Shape, arguments: argparse.Namespace) -> int:
    """Measure a candidate's peak memory on a CPU, in a process of its own."""
    options = [f"--{key}={getattr(arguments, key)}" for key in ("device", "dtype", "threads")]
    command = [sys.executable, __file__, *options, "--memory-of", name, "--shape", str(shape)]
    # freed memory goes back to the system at once, so that one step's garbage does not hide the next one's needs
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def one_peak(name: str, shape: Shape, arguments: argparse.Namespace) -> int:
    """Measure a candidate's peak memory in this process."""
    problem = make_problem(shape, arguments.device, getattr(torch, arguments.dtype))
    step = training_step(problem, CANDIDATES[name](problem))
    return peak_bytes(leaving_nothing(step, problem), arguments.device)


def candidates(problem: Problem, without: Collection[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """Build every candidate's step but some and run it once; also say why others were left out."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for name, build in CANDIDATES.items():
        if name in without:
            continue
        try:
            step = training_step(problem, build(problem))
            step()
            steps[name] = step
        except Exception as e:  # noqa: BLE001 - a peer's or a compiler's fault costs its own figures alone
            left_out[name] = (str(e).splitlines() or [type(e).__name__])[0][:110]
    return steps, left_out


def bound_s(work: Work, bandwidth: float, operations: float) -> float:
    """Bound a step's time from below."""
    return max(work.bytes / bandwidth, work.operations / operations)


def medians_in_any_order(steps: dict[str, Step], device: str, repeats: int) -> dict[str, float]:
    """Time the candidates in another order every round: whoever follows a relative finds its code in the cache."""
    order, times = random.Random(0), {name: [] for name in steps}
    for _ in range(repeats):
        for name in order.sample(list(steps), len(steps)):
            times[name].append(seconds(steps[name], device))
    return {name: statistics.median(column) for name, column in times.items()}


def measure(
    shape: Shape, arguments: argparse.Namespace, bandwidth: float, operations: float
) -> Iterator[dict[str, Any]]:
    """Run all candidates on a shape."""
    torch.compiler.reset()  # many recompilations would end in eager execution
    problem = make_problem(shape, arguments.device, getattr(torch, arguments.dtype))
    apart = set(CANDIDATES) - {"distilbeam", *DIVERGENCES} if "peers" in arguments.without else set()
    steps, left_out = candidates(problem, {*arguments.without, *apart})
    times = medians_in_any_order(steps, arguments.device, arguments.repeats)
    bound = bound_s(problem.work, bandwidth, operations)
    for name, taken in times.items():
        figures: dict[str, Any] = {"ms": round(1e3 * taken, 3), "of roofline": round(bound / taken, 3)}
        on_gpu = arguments.device == "cuda"
        if on_gpu:
            figures["host ms"] = round(1e3 * host_seconds(steps[name]), 3)
        if name in DIVERGENCES:
            figures["of tail"] = round(taken / times["distilbeam"], 3)
        if not arguments.no_memory:
            step = leaving_nothing(steps[name], problem)
            peak = peak_bytes(step, "cuda") if on_gpu else measured_peak(name, shape, arguments)
            figures["peak MiB"] = round(peak / 2**20, 1)
        yield {"shape": str(shape), "candidate": name, **figures}
    for name, reason in left_out.items():
        yield {"shape": str(shape), "candidate": name, "left out": reason}
    mine = {name: times[name] for name in OURS if name in times}
    others = {name: taken for name, taken in times.items() if not name.startswith("distilbeam")}
    if not (mine and others):
        return
    yield {
        "shape": str(shape),
        "fastest of ours": min(mine, key=mine.__getitem__),
        "chosen / fastest of ours": round(times["distilbeam"] / min(mine.values()), 3),
        "chosen / fastest peer": round(times["distilbeam"] / min(others.values()), 3),
        "fastest peer": min(others, key=others.__getitem__),
    }


def line(row: dict[str, Any]) -> str:
    """Lay out a result."""
    return " | ".join(f"{v}" if k in ("shape", "candidate") else f"{k} {v}" for k, v in row.items())


def main() -> None:
    """Parse the command line, measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=sorted(GRIDS), default="target")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds, no peaks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after this long")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=[*list(CANDIDATES)[1:], "peers"],
        metavar="NAME",
        help="leave these out",
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began = time.monotonic()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(one_peak(arguments.memory_of, SHAPES[arguments.shape], arguments))
        return
    if arguments.quick:
        arguments.grid, arguments.repeats, arguments.no_memory = "quick", 3, True
    bandwidth, operations = (
        copy_speed(arguments.device),
        product_speed(arguments.device, getattr(torch, arguments.dtype)),
    )
    about = machine(
        ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl"),
        threads=arguments.threads,
        copy_GB_s=round(bandwidth / 1e9, 1),
        product_Gop_s=round(operations / 1e9, 1),
        gpu=torch.cuda.get_device_name() if arguments.device == "cuda" else None,
    )
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    rows: list[dict[str, Any]] = []
    for shape in GRIDS[arguments.grid]:
        if time.monotonic() - began > arguments.seconds:
            rows.append({"shape": str(shape), "left out": f"begun after {arguments.seconds:.0f} s"})
            continue
        for row in measure(shape, arguments, bandwidth, operations):
            rows.append(row)
            print(line(row), flush=True)
        write(arguments.json, about, rows)


if __name__ == "__main__":
    main()
