"""What an exported file says of itself, wherever it is taken without its folder: in ONNX's metadata, in a pt2's extra files.

Each entry is a text, of JSON where it is more than a word: `classes` in the order of the logits, `input` (what a caller makes of
an example before: an `input` section of distilbeam), `graph` (what the graph does itself), `dimensions` (names of the axes of any
size), `student` (its fingerprint), `parameters`, `weights_bytes` (of the student in float32), `packages` (versions).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXTRA_FILE = "distilbeam.json"  # among the extra files of a pt2


def entries(about: Mapping[str, Any]) -> dict[str, str]:
    """Write what is said of a file as texts."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def annotate_onnx(file: Path, about: Mapping[str, Any], dimensions: Mapping[int, str]) -> None:
    """Write the metadata of an ONNX file, and give the dimensions of any size their names.

    Args:
      file: ONNX with one input; its first dimension is the batch.
      about: what is said of it.
      dimensions: names of the input's dimensions of any size.
    """
    import onnx

    model = onnx.load(file)
    (given,) = model.graph.input
    former = {
        dim.dim_param: dimensions[place]
        for place, dim in enumerate(given.type.tensor_type.shape.dim)
        if place in dimensions and dim.dim_param
    }
    del model.graph.value_info[:]  # shapes in between, in the exporter's own symbols; runtimes infer them
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in former:
                dim.dim_param = former[dim.dim_param]
    onnx.helper.set_model_props(model, entries(about))
    model.producer_name = "distilbeam"
    onnx.save(model, file)
