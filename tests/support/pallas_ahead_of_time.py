"""Compile the Pallas kernels of the losses for chips that are not there: `program rows,features,classes,kept chip...`."""

from __future__ import annotations

import sys

import jax.numpy as jnp
from tpu_compiler import Array, Works, compile_for

from distilbeam.kernels.distillation import pallas_kernels as of_logits
from distilbeam.kernels.linear_distillation import pallas_kernels as of_layer


def works(array: Array, rows: int, features: int, classes: int, kept: int) -> Works:
    """Name the functions to compile, with the shapes of their arguments."""

    def layer(dtype: object, classes: int) -> list[object]:
        values = [array((size, features), dtype) for size in (rows, classes)]
        return [*values, array((rows, 1)), array((classes,)), array((classes,)), chosen]

    chosen = array((rows, kept), jnp.int32)
    logits = [array((rows, classes), jnp.bfloat16), chosen]
    slopes = [array((rows, kept)), array((rows, 1)), array((rows, 1))]
    found: Works = {}
    # every part of the classes is compiled by itself: two of them in one dtype are enough
    for suffix, operands in (("", layer(jnp.bfloat16, classes)), ("-int8", layer(jnp.int8, classes // 2))):
        found[f"first_pass{suffix}"] = (lambda *a: of_layer.first_pass(*a, 1.0), operands)
        found[f"gradients{suffix}"] = (lambda *a: of_layer.gradients(*a, 1.0), [*operands, *slopes])
    found["logit_buckets"] = (lambda *a: of_logits.logit_buckets(*a, 1.0), logits)
    found["logit_gradient"] = (lambda *a: of_logits.logit_gradient(*a, 1.0), [*logits, *slopes])
    return found


if __name__ == "__main__":
    sizes = [int(size) for size in sys.argv[1].split(",")]
    compile_for(sys.argv[2:], lambda array: works(array, *sizes))
