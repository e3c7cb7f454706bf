"""Compile the Pallas kernels of the losses for chips that are not there: `program rows,classes,kept chip...`."""

from __future__ import annotations

import sys

import jax.numpy as jnp
from tpu_compiler import Array, Works, compile_for

from distilbeam.kernels.distillation import pallas_kernels as of_logits


def works(array: Array, rows: int, classes: int, kept: int) -> Works:
    """Name the functions to compile, with the shapes of their arguments."""
    chosen = array((rows, kept), jnp.int32)
    logits = [array((rows, classes), jnp.bfloat16), chosen]
    slopes = [array((rows, kept)), array((rows, 1)), array((rows, 1))]
    found: Works = {}
    found["logit_buckets"] = (lambda *a: of_logits.logit_buckets(*a, 1.0), logits)
    found["logit_gradient"] = (lambda *a: of_logits.logit_gradient(*a, 1.0), [*logits, *slopes])
    return found


if __name__ == "__main__":
    sizes = [int(size) for size in sys.argv[1].split(",")]
    compile_for(sys.argv[2:], lambda array: works(array, *sizes))
