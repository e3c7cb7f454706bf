"""Where 8-bit products pay: the smallest sizes for each kind of device; and the shapes that are measured for it.

A product in 8 bits also quantises its input, which costs a pass over memory; below some size that costs more than the
faster product saves. For CUDA only the products were measured, on an H200 (`benchmarks/results/kernels-h200.json`): at
4096 x 4096 x 4096 torch's fp8 and Triton's int8 product are 1.6 times as fast as bfloat16's, at 1024 x 2048 x 1024 no
faster. The bounds are therefore the former; whole layers, with their quantisation, remain to be measured. A device that is
not listed has no shape that pays: on a CPU that was measured, 0.6 to 0.7 times the speed of float32.
`benchmarks/low_precision.py` measures what should stand here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """A product: rows M, inputs K, outputs N."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.inputs}x{self.outputs}"


QUICK = (Shape(256, 128, 128), Shape(512, 256, 256))
CPU = (Shape(256, 512, 512), Shape(1024, 1024, 1024), Shape(4096, 1024, 1024))
GPU = (
    *(Shape(rows, size, size) for rows in (4096, 16_384) for size in (4096, 2048, 1024)),
    Shape(1024, 2048, 1024),
)
GPU_ALL = tuple(
    Shape(rows, size, size) for rows in (1024, 4096, 16_384, 65_536) for size in (256, 1024, 2048, 4096, 8192)
)

SMALLEST_ON_CUDA = {  # compute capability from which the row holds, latest first
    "fp8": {(8, 9): Shape(4096, 4096, 4096)},
    "int8": {(8, 0): Shape(4096, 4096, 4096)},
}


def why_not(form: str, rows: int, inputs: int, outputs: int, device: torch.device) -> str | None:
    """Say why a layer gains nothing by 8 bits; None when it is expected to gain.

    Args:
      form: `fp8` or `int8`.
      rows: rows that go through the layer in a step: examples times positions.
      inputs: K.
      outputs: N.
      device: where the layer is.
    """
    if device.type != "cuda":
        return f"no {form} product is known to pay on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    bounds = [least for since, least in SMALLEST_ON_CUDA[form].items() if capability >= since]
    if not bounds:
        return f"the GPU has no {form} products (compute capability {capability[0]}.{capability[1]})"
    least = bounds[0]
    if rows >= least.rows and inputs >= least.inputs and outputs >= least.outputs:
        return None
    return (
        f"{rows:,} x {inputs:,} x {outputs:,} is below {least.rows:,} x {least.inputs:,} x {least.outputs:,}, "
        "from where 8 bits are expected to pay (not measured)"
    )
