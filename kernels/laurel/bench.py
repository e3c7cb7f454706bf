"""What a benchmark runs of `laurel_residual`: operands of a shape, a step of an implementation, the bytes it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels.laurel.interface import laurel_residual
from distilbeam.kernels.laurel.shapes import Shape
from distilbeam.kernels.quantize.formats import FORMATS, QuantizedRows

FORMS = ("sum", "norm", "int8", "fp8")  # x' alone; its norm too; that in 8 bits


class Problem:
    """The operands of a shape, and gradients from above."""

    def __init__(self, shape: Shape, form: str, device: str, dtype: torch.dtype) -> None:
        """Draw the tensors of a shape from a fixed seed."""
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.form = shape, form

        def random(*size: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
            return (scale * torch.randn(*size, generator=generator, device=device)).to(kind).requires_grad_()

        rows, dim, rank = shape.rows, shape.dim, shape.rank
        self.rows = [random(rows, dim, kind=dtype) for _ in range(2)]
        self.maps = [random(dim, rank, scale=dim**-0.5), random(rank, dim, scale=0.1)]
        self.scalars = [torch.ones((), device=device).requires_grad_() for _ in range(2)]
        self.norm = [] if form == "sum" else [torch.ones(dim, device=device).requires_grad_()]
        self.above = [random(rows, dim, kind=dtype).detach() for _ in range(1 if form == "sum" else 2)]

    @property
    def leaves(self) -> list[Tensor]:
        """All operands with a gradient."""
        return [*self.rows, *self.scalars, *self.maps, *self.norm]

    def least_bytes(self) -> int:
        """Bytes of reading every operand and writing every result once, forward and backward."""
        size = self.rows[0].element_size()
        forward = 3 * size + {"sum": 0, "norm": size}.get(self.form, 1)
        backward = (5 if self.form == "sum" else 7) * size  # f, x and gradients; with a norm x' and its gradient too
        return (forward + backward) * self.shape.rows * self.shape.dim


def backward(outputs: Sequence[Tensor], problem: Problem) -> None:
    """Compute the gradients of all operands."""
    torch.autograd.grad(outputs[: len(problem.above)], problem.leaves, problem.above)


def step(problem: Problem, implementation: str | None) -> Callable[[], None]:
    """Give a function that takes a step of an implementation, forward and backward."""
    names = ("update", "residual", "alpha", "beta", "down", "up", "norm_weight")
    arguments: dict[str, Any] = dict(zip(names, problem.leaves, strict=False))
    arguments["quantize"] = problem.form if problem.form in FORMATS else None

    def take() -> None:
        out: Any = laurel_residual(**arguments, implementation=implementation)
        found: list[Any] = [out] if isinstance(out, Tensor) else list(out)
        backward([_in_autograd(x) for x in found], problem)

    return take


def _in_autograd(x: Any) -> Any:
    return x.straight if isinstance(x, QuantizedRows) else x
