"""Compile the low-precision Pallas kernels with the TPU's own compiler for chips that are not there; one JSON line each.

Run as a program of its own: the compiler reads its settings from the environment when it is loaded, and takes a lock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from distilbeam.kernels.laurel import pallas_kernels as laurel
from distilbeam.kernels.laurel.operands import Wanted
from distilbeam.kernels.low_precision.pallas_kernels import scaled_product
from distilbeam.kernels.quantize.formats import FORMATS
from distilbeam.kernels.quantize.pallas_kernels import JAX_DTYPES, quantize

ROWS, DIM, RANK = 1024, 2048, 16


def works(array: Callable[..., Any]) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Name the functions to compile, with the shapes of their arguments."""
    rows, column = array((ROWS, DIM), jnp.bfloat16), array((ROWS, 1))
    maps = [array((DIM, RANK)), array((RANK, DIM))]
    found: dict[str, tuple[Callable[..., Any], list[Any]]] = {}
    for form in ("int8", "fp8"):
        target = FORMATS[form]
        narrow = array((ROWS, DIM), JAX_DTYPES[str(target.dtype)])
        scales = [column, array((1, ROWS)), array((1, ROWS))]
        found[f"quantize-{form}"] = (lambda x, target=target: quantize(x, target), [rows])
        found[f"product-{form}"] = (lambda *a: scaled_product(*a, "bfloat16"), [narrow, narrow, *scales])
    forward = [rows, rows, array((3,)), *maps, array((DIM,)), [rows]]
    found["residual"] = (laurel.forward, [*forward[:5], None, [rows]])
    found["residual-int8"] = (lambda *a: laurel.forward(*a, FORMATS["int8"]), forward)
    kept = {"f": rows, "x": rows, "p0": rows, "down": maps[0], "up": maps[1], "weight": array((1, DIM)), "total": rows}
    kept |= {"low": array((ROWS, RANK)), "inverse": column}
    slopes = {"d_total": rows, "d_normed": rows}
    wanted = Wanted(*[True] * len(Wanted._fields))
    found["gradients"] = (lambda *a: laurel.backward(*a, wanted), [kept, array((3,)), slopes])
    return found


def main() -> None:
    """Compile for each chip named on the command line."""
    for name in sys.argv[1:]:
        device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        mesh = jax.sharding.Mesh(np.array([device]), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def array(shape: tuple[int, ...], dtype: Any = jnp.float32, sharding: Any = sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        for work, (function, inputs) in works(array).items():
            start = time.perf_counter()
            lowered = jax.jit(function).lower(*inputs)
            memory = lowered.compile().memory_analysis()
            report = {
                "chip": name,
                "work": work,
                "kernels": lowered.as_text().count("tpu_custom_call"),
                "temporary_bytes": memory.temp_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "seconds": round(time.perf_counter() - start, 1),
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
