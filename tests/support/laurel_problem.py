"""A learned augmented residual with every part, computed exactly, plainly in the rows' own precision, and by a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels import QuantizedRows, laurel_residual


@dataclass(frozen=True)
class Case:
    """Sizes and parts: rank 0 has no maps; quantize asks for the norm in 8 bits."""

    rows: int
    dim: int
    rank: int
    previous: int = 0
    norm: bool = False
    quantize: str | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        form = self.quantize or ("norm" if self.norm else "plain")
        return f"{self.rows}x{self.dim}-r{self.rank}-p{self.previous}-{form}-{str(self.dtype).removeprefix('torch.')}"


def operands(case: Case, seed: int = 0) -> dict[str, Any]:
    """Random operands; the parameters are float32 as an optimizer holds them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    rows = [random(case.rows, case.dim, dtype=case.dtype) for _ in range(2 + case.previous)]
    made: dict[str, Any] = {"update": rows[0], "residual": rows[1], "alpha": torch.tensor(0.7)}
    made["beta"] = torch.tensor(1.3)
    if case.rank:
        made["down"] = random(case.dim, case.rank, scale=case.dim**-0.5)
        made["up"] = random(case.rank, case.dim, scale=0.5)
    if case.previous:
        made |= {"gamma": random(case.previous), **{f"previous{j}": x for j, x in enumerate(rows[2:])}}
    if case.norm:
        made["norm_weight"] = 1 + 0.3 * random(case.dim)
    return made


def value_and_gradients(
    case: Case, given: dict[str, Any], implementation: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """Run forward and backward; results and gradients in float64, quantised rows brought back."""
    leaves = {name: x.to(device=device, dtype=dtype or x.dtype).clone().requires_grad_() for name, x in given.items()}
    arguments = {name: x for name, x in leaves.items() if not name.startswith("previous")}
    arguments["previous"] = tuple(leaves[f"previous{j}"] for j in range(case.previous))
    out = laurel_residual(**arguments, quantize=case.quantize, implementation=implementation)
    outputs = [out] if isinstance(out, Tensor) else [out.residual, out.normed]
    values = [x.values.float() * x.scale if isinstance(x, QuantizedRows) else x for x in outputs]
    tensors = [x.straight if isinstance(x, QuantizedRows) else x for x in outputs]
    generator = torch.Generator().manual_seed(99)
    above = [torch.randn(case.rows, case.dim, generator=generator) for _ in tensors]
    above = [g.to(case.dtype).to(device=x.device, dtype=x.dtype) for g, x in zip(above, tensors, strict=True)]
    slopes = torch.autograd.grad(tensors, list(leaves.values()), above)
    found = dict(zip(("total", "normed"), values, strict=False)) | {
        f"d_{name}": slope for name, slope in zip(leaves, slopes, strict=True)
    }
    return {name: x.detach().double().cpu() for name, x in found.items()}


HALF_A_STEP = {"fp8": 2**-4, "int8": 0.5 / 127}  # of a row's largest number


def check(case: Case, implementation: str, device: str = "cpu") -> None:
    """Hold a backend against float64: no further off than plain torch in the rows' precision, and one rounding more."""
    given = operands(case)
    exact = value_and_gradients(replace(case, quantize=None), given, "reference", torch.float64)
    plain = value_and_gradients(case, given, "reference", case.dtype)
    found = value_and_gradients(case, given, implementation, device=device)
    assert found.keys() == exact.keys()
    for name, truth in exact.items():
        size = float(truth.abs().max())
        # one rounding of the rows' dtype, and the order of sums in float32
        allowed = torch.finfo(case.dtype).eps * size + 5e-6 * max(1.0, size)
        if name == "normed" and case.quantize:
            allowed += HALF_A_STEP[case.quantize] * size
        else:
            allowed += float((plain[name] - truth).abs().max())
        assert float((found[name] - truth).abs().max()) <= allowed, (name, allowed, size)
