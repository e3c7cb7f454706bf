"""Compile the low-precision Pallas kernels for chips that are not there: `program chip...`."""

from __future__ import annotations

import sys

import jax.numpy as jnp
from tpu_compiler import Array, Works, compile_for

from distilbeam.kernels.laurel import pallas_kernels as laurel
from distilbeam.kernels.laurel.operands import Wanted
from distilbeam.kernels.quantize.formats import FORMATS
from distilbeam.kernels.quantize.pallas_kernels import quantize

ROWS, DIM, RANK = 1024, 2048, 16


def works(array: Array) -> Works:
    """Name the functions to compile, with the shapes of their arguments."""
    rows, column = array((ROWS, DIM), jnp.bfloat16), array((ROWS, 1))
    maps = [array((DIM, RANK)), array((RANK, DIM))]
    found: Works = {}
    for form in ("int8", "fp8"):
        target = FORMATS[form]
        found[f"quantize-{form}"] = (lambda x, target=target: quantize(x, target), [rows])
    forward = [rows, rows, array((3,)), *maps, array((DIM,)), [rows]]
    found["residual"] = (laurel.forward, [*forward[:5], None, [rows]])
    found["residual-int8"] = (lambda *a: laurel.forward(*a, FORMATS["int8"]), forward)
    kept = {"f": rows, "x": rows, "p0": rows, "down": maps[0], "up": maps[1], "weight": array((1, DIM)), "total": rows}
    kept |= {"low": array((ROWS, RANK)), "inverse": column}
    slopes = {"d_total": rows, "d_normed": rows}
    wanted = Wanted(*[True] * len(Wanted._fields))
    found["gradients"] = (lambda *a: laurel.backward(*a, wanted), [kept, array((3,)), slopes])
    return found


if __name__ == "__main__":
    compile_for(sys.argv[1:], works)
