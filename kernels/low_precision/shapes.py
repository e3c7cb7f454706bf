"""Where 8-bit products pay: the smallest sizes for each kind of device; and the shapes that are measured for it.

A product in 8 bits also quantises its input, which costs a pass over memory, and its backward pass widens what it kept; below
some size that costs more than the faster product saves. Nowhere does it pay so far: on a CPU a layer has 0.6 to 0.7 times the
speed of float32, on an H200 0.62 times that of bfloat16 at 4096 x 4096 x 4096 (0.48 at 4096 x 2048 x 2048), although fp8's and
int8's products alone are 1.6 times as fast there (`benchmarks/results/low_precision-h200.json`, `kernels-h200.json`).
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
DRY = (Shape(32, 32, 32),)  # for an interpreter
CPU = (Shape(256, 512, 512), Shape(1024, 1024, 1024), Shape(4096, 1024, 1024))
GPU = (
    *(Shape(rows, size, size) for rows in (4096, 16_384) for size in (4096, 2048, 1024)),
    Shape(1024, 2048, 1024),
)
GPU_ALL = tuple(
    Shape(rows, size, size) for rows in (1024, 4096, 16_384, 65_536) for size in (256, 1024, 2048, 4096, 8192)
)

SMALLEST: dict[str, dict[str, Shape]] = {"fp8": {}, "int8": {}}  # by kind of device, from where on 8 bits pay


def why_not(form: str, rows: int, inputs: int, outputs: int, device: torch.device) -> str | None:
    """Say why a layer gains nothing by 8 bits; None when it is expected to gain.

    Args:
      form: `fp8` or `int8`.
      rows: rows that go through the layer in a step: examples times positions.
      inputs: K.
      outputs: N.
      device: where the layer is.
    """
    least = SMALLEST[form].get(device.type)
    if least is None:
        return f"no {form} layer is known to pay on {device.type}"
    if rows >= least.rows and inputs >= least.inputs and outputs >= least.outputs:
        return None
    return (
        f"{rows:,} x {inputs:,} x {outputs:,} is below {least.rows:,} x {least.inputs:,} x {least.outputs:,}, "
        "from where 8 bits pay"
    )
