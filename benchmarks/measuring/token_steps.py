"""A step of a language model's last layer and its loss, forward and backward: fused, on whole logits, and by the peers.

Hidden states [tokens, features] and a head [classes, features] meet a teacher's top-k label, or, for those who know no other
label, the teacher's own hidden states and head, whose logits they compute tile by tile, or its full distribution. One candidate's
peak memory is measured in a process of its own:

    python -m measuring.token_steps NAME OBJECTIVE SHAPE THREADS
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.kernels.linear_distillation.bench import LayerProblem
from distilbeam.kernels.linear_distillation.interface import linear_distill_loss
from distilbeam.kernels.linear_distillation.shapes import Shape
from measuring.steps import Step, medians, peak_bytes

Loss = Callable[[], Tensor]
# steps of 512 and of 2,048 tokens with the head of SmolLM2-135M: the gradients that every way returns are as large in both
SHAPES = {str(s): s for s in (Shape(512, 576, 49_152, 64), Shape(2048, 576, 49_152, 64), Shape(64, 32, 2_000, 16))}
FULL, LONG, QUICK = SHAPES
BETAS = {"tail": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # as the peers count: 0 is forward KL, 1 reverse KL


def fused(problem: LayerProblem, objective: str) -> Loss:
    """Our loss together with the layer."""
    return lambda: linear_distill_loss(*problem.leaves, None, problem.labels, objective=objective)


def whole_logits(problem: LayerProblem, objective: str) -> Loss:
    """The layer, then our loss of its logits."""
    return lambda: distill_loss(functional.linear(*problem.leaves), problem.labels, objective=objective)


def plain_torch(problem: LayerProblem, objective: str) -> Loss:
    """The layer, then the loss over the kept classes and the rest, as one would write it."""
    labels, beta = problem.labels, BETAS[objective]
    assert labels.tail_logmass is not None
    teacher = torch.cat([labels.logprobs, labels.tail_logmass[:, None]], 1)

    def loss() -> Tensor:
        kept = functional.linear(*problem.leaves).float().log_softmax(1).gather(1, labels.classes)
        rest = torch.log(-torch.expm1(kept.logsumexp(1, keepdim=True).clamp(max=-1e-7)))
        return divergence(torch.cat([kept, rest], 1), teacher, beta)

    return loss


def plain_dense(problem: LayerProblem, objective: str) -> Loss:
    """The layer, then the loss to the teacher's full distribution."""
    dense, beta = problem.dense, BETAS[objective]
    if dense is None:
        raise NotImplementedError("the teacher's full distribution does not fit")
    return lambda: divergence(functional.linear(*problem.leaves).float().log_softmax(1), dense, beta)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence of log-probabilities, whose ends are the two KL's."""
    if beta == 0:
        return (teacher.exp() * (teacher - student)).sum(1).mean()
    if beta == 1:
        return (student.exp() * (student - teacher)).sum(1).mean()
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    of_teacher = (teacher.exp() * (teacher - mixture)).sum(1)
    return (beta * of_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(1)).mean()


def liger(problem: LayerProblem, objective: str) -> Loss:
    """Liger's chunked Jensen-Shannon loss as shipped, compiled, which computes the teacher's layer too."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    options = (problem.hard, None, None, 0.0, 1.0, BETAS[objective])

    def loss() -> Tensor:
        out = LigerFusedLinearJSDFunction.apply(*problem.leaves, *problem.teacher, *options)
        return out[0] if isinstance(out, tuple) else out

    return loss


def trl_chunked(problem: LayerProblem, objective: str) -> Loss:
    """TRL's chunked divergence, which computes the teacher's layer too."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    (hidden, weight), (of_teacher, head), beta = problem.leaves, problem.teacher, BETAS[objective]
    return lambda: ChunkedDivergenceFunction.apply(hidden, weight, None, of_teacher, head, None, beta)[0].mean()


CANDIDATES: dict[str, Callable[[LayerProblem, str], Loss]] = {
    "distilbeam fused": fused,
    "distilbeam, whole logits": whole_logits,
    "torch, whole logits": plain_torch,
    "torch, whole logits, dense labels": plain_dense,
    "Liger fused": liger,
    "TRL chunked": trl_chunked,
}


IN_LONG_STEPS = ("distilbeam fused", "torch, whole logits", "Liger fused")


def step_of(problem: LayerProblem, name: str, objective: str) -> Step:
    """Give a candidate's step: forward and backward, after which the gradients are forgotten."""
    loss = CANDIDATES[name](problem, objective)

    def step() -> None:
        loss().backward()
        for leaf in problem.leaves:
            leaf.grad = None

    return step


def measure(
    shape_name: str, objective: str, threads: int, repeats: int, names: Sequence[str] = tuple(CANDIDATES)
) -> Iterator[dict[str, Any]]:
    """Time every candidate in turn, and measure what each holds.

    Args:
      shape_name: of SHAPES.
      objective: of BETAS.
      threads: of torch.
      repeats: rounds.
      names: of the candidates.

    Yields:
      A row for each candidate: `ms` of processor time over threads; `peak MiB` beyond the inputs, `beyond gradients` the same
      without the gradients of hidden states and head, which every candidate has to give; both also over those of the fused one.
      Or the reason why a candidate was left out.
    """
    torch.compiler.reset()
    shape = SHAPES[shape_name]
    problem = LayerProblem(shape, "cpu", torch.float32)
    steps: dict[str, Step] = {}
    about = {"objective": objective, "shape": shape_name}
    for name in names:
        try:
            step = step_of(problem, name, objective)
            step()
            steps[name] = step
        except Exception as e:  # noqa: BLE001 - a peer's fault costs its own figures alone
            yield {**about, "candidate": name, "left out": (str(e).splitlines() or [type(e).__name__])[0][:110]}
    times = medians(steps, "cpu", repeats)
    gradients = 4 * shape.features * (shape.rows + shape.classes)
    base: dict[str, float] = {}
    for name, taken in times.items():
        peak = _peak_in_a_process(name, objective, shape_name, threads)
        figures = {"ms": 1e3 * taken, "peak MiB": peak / 2**20, "beyond gradients": (peak - gradients) / 2**20}
        base = base or figures
        ratios = {f"{key} / fused": round(value / base[key], 2) for key, value in figures.items()}
        yield {**about, "candidate": name, **{key: round(value, 1) for key, value in figures.items()}, **ratios}


def _peak_in_a_process(name: str, objective: str, shape_name: str, threads: int) -> int:
    folder = Path(__file__).resolve().parents[1]
    before = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    # freed memory goes back to the system at once, so that one step's garbage does not hide the next one's needs
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *before])
    command = [sys.executable, "-m", "measuring.token_steps", name, objective, shape_name, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Print the peak memory of one candidate's step in bytes."""
    name, objective, shape_name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    problem = LayerProblem(SHAPES[shape_name], "cpu", torch.float32)
    print(peak_bytes(step_of(problem, name, objective), "cpu"))


if __name__ == "__main__":
    main()
