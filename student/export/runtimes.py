"""Exported models as functions of arrays, each in its own runtime and nothing else: ONNX Runtime needs no torch here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]


def open_runner(file: Path, threads: int | None = None) -> Run:
    """Load an exported model.

    Args:
      file: an `.onnx` or `.pt2` file with one input and one output.
      threads: most threads of one operation; the runtime's own choice without it.

    Returns:
      A function from inputs [rows, ...] to logits, float32 [rows, C].

    Raises:
      ValueError: the file's kind is unknown, its runtime is not installed, or it holds no such model.
    """
    makers = {".onnx": _onnx, ".pt2": _pt2}
    if file.suffix not in makers:
        raise ValueError(f"an exported model must be a file of kind {' or '.join(makers)}, got {file}")
    return makers[file.suffix](file, threads)


def _onnx(file: Path, threads: int | None) -> Run:
    try:
        import onnxruntime
    except ImportError as e:
        raise ValueError(f"running {file} needs ONNX Runtime; install distilbeam[onnx]") from e
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its own exception classes are not public
        raise ValueError(f"{file} cannot be run by ONNX Runtime: {str(e).splitlines()[0]}") from e
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = session.run([output], {name: inputs})[0]
        return logits

    return run


def _pt2(file: Path, threads: int | None) -> Run:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from distilbeam.teacher.programs import load_program

    module = load_program(file, "the export").module()

    def run(inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = module(torch.from_numpy(inputs)).float().numpy()
        return logits

    return run
