"""Compile the Pallas kernels with the TPU's own compiler for chips that are not there; prints one JSON line per chip.

Run as a program of its own: the compiler reads its settings from the environment when it is loaded, and takes a lock.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from distilbeam.kernels.distillation import pallas_kernels as of_logits
from distilbeam.kernels.linear_distillation import pallas_kernels as of_layer

FUNCTIONS = {
    "first_pass": of_layer.first_pass,
    "gradients": of_layer.gradients,
    "first_pass-int8": of_layer.first_pass,
    "gradients-int8": of_layer.gradients,
    "logit_buckets": of_logits.logit_buckets,
    "logit_gradient": of_logits.logit_gradient,
}


def arguments(
    rows: int, features: int, classes: int, kept: int, sharding: object
) -> dict[str, list[jax.ShapeDtypeStruct]]:
    """Describe the arguments of the functions."""

    def array(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def layer(dtype: object) -> list[jax.ShapeDtypeStruct]:
        column, row = array((rows, 1), jnp.float32), array((classes,), jnp.float32)
        values = [array((size, features), dtype) for size in (rows, classes)]
        return [*values, column, row, row, array((rows, kept), jnp.int32)]

    logits = [array((rows, classes), jnp.bfloat16), array((rows, kept), jnp.int32)]
    column = array((rows, 1), jnp.float32)
    slopes = [array((rows, kept), jnp.float32), column, column]
    return {
        "first_pass": layer(jnp.bfloat16),
        "gradients": [*layer(jnp.bfloat16), *slopes],
        "first_pass-int8": layer(jnp.int8),
        "gradients-int8": [*layer(jnp.int8), *slopes],
        "logit_buckets": logits,
        "logit_gradient": [*logits, *slopes],
    }


def main() -> None:
    """Compile for each chip named on the command line."""
    shape = [int(size) for size in sys.argv[1].split(",")]
    for name in sys.argv[2:]:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        mesh = jax.sharding.Mesh(np.array([device]), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for function, inputs in arguments(*shape, sharding).items():
            start = time.perf_counter()
            compute = FUNCTIONS[function]
            lowered = jax.jit(lambda *a, compute=compute: compute(*a, 1.0)).lower(*inputs)
            memory = lowered.compile().memory_analysis()
            report = {
                "chip": name,
                "function": function,
                "kernels": lowered.as_text().count("tpu_custom_call"),
                "argument_bytes": memory.argument_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
