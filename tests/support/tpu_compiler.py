"""Compile JAX functions with the TPU's own compiler for chips that are not there; prints one JSON line per function and chip.

Imported by programs of their own: the compiler reads its settings from the environment when it is loaded, and takes a lock.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

Array = Callable[..., jax.ShapeDtypeStruct]
Works = dict[str, tuple[Callable[..., Any], list[Any]]]


def compile_for(chips: Sequence[str], works: Callable[[Array], Works]) -> None:
    """Compile for each chip.

    Args:
      chips: topologies such as `v5e:2x2`.
      works: from a function that describes an array, by shape and dtype, to named functions and their arguments.
    """
    for chip in chips:
        device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
        mesh = jax.sharding.Mesh(np.array([device]), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def array(shape: tuple[int, ...], dtype: Any = jnp.float32, sharding: Any = sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        for work, (function, arguments) in works(array).items():
            print(json.dumps({"chip": chip, "work": work, **_compiled(function, arguments)}), flush=True)


def _compiled(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    memory = lowered.compile().memory_analysis()
    return {
        "kernels": lowered.as_text().count("tpu_custom_call"),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }
