"""A teacher that is a PyTorch model in this process.

Nothing is unpickled: programs are read by `torch.export.load`, weights by safetensors or by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from distilbeam.teacher.artefact import Artefact
from distilbeam.teacher.config import TorchConfig
from distilbeam.teacher.halving import Halving
from distilbeam.teacher.preprocess import load_object, make_input


class TorchTeacher:
    """Answers with a PyTorch model.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: a file, module, device or output that the configuration names cannot be used.
    """

    parallel = 1

    def __init__(self, config: TorchConfig) -> None:
        self._config = config
        self._artefact = Artefact(_files(config), _settings(config))
        self._input = make_input(config.input)
        self._device = _device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._fixed_rows: int | None = None
        self._model: Any = self._load()
        self._forward = Halving(self._run, _out_of_memory, self._release, self._fixed_rows or config.batch_rows)

    def fingerprint(self) -> str:
        """Identify the answers by the files and settings; see `Teacher`."""
        name = Path(self._config.model).name if self._config.exported else self._config.model
        return f"torch:{name}:{self._artefact.digest()}"

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch; see `Teacher`."""
        return self._forward(self._input(batch))

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(p.numel() for p in self._model.parameters()) if isinstance(self._model, torch.nn.Module) else 0

    def close(self) -> None:
        """Drop the model and the device's memory; see `Teacher`."""
        self._model = None
        self._release()

    def _load(self) -> Any:
        if not self._config.exported:
            return _made(self._config).to(device=self._device, dtype=self._dtype).eval()
        try:
            program = torch.export.load(self._config.model)
        except Exception as e:
            raise ValueError(
                f"teacher.model: {self._config.model} is not a torch.export program: {_first_line(e)}"
            ) from e
        self._fixed_rows = _fixed_rows(program)
        return program.module().to(device=self._device, dtype=self._dtype)

    @torch.inference_mode()
    def _run(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if self._model is None:
            raise RuntimeError("the teacher was closed; load it again")
        padded = _padded(inputs, self._fixed_rows)
        tensor = torch.from_numpy(np.require(padded, requirements="W")).to(self._device)
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        output = select_output(self._model(tensor), self._config.output)
        answer: npt.NDArray[np.float32] = output.float().cpu().numpy()
        return answer[: len(inputs)] if len(answer) == len(padded) else answer

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def select_output(outputs: Any, output: str | int | None) -> Any:
    """Find the logits among a model's outputs.

    Args:
      outputs: a tensor, a sequence or a mapping of them.
      output: name or position; without it the only output, the one called `logits`, or the first of a sequence.

    Returns:
      The tensor.

    Raises:
      ValueError: there is no such output.
    """
    if isinstance(outputs, Mapping):
        names = list(outputs)
        name = output if output is not None else names[0] if len(names) == 1 else "logits"
        if name not in outputs:
            raise ValueError(
                f"teacher.output must be one of the model's outputs {', '.join(map(str, names))}, got {name!r}"
            )
        return outputs[name]
    if isinstance(outputs, (tuple, list)):
        position = 0 if output is None else output
        if not isinstance(position, int) or not -len(outputs) <= position < len(outputs):
            raise ValueError(f"teacher.output must be a position below {len(outputs)}, got {output!r}")
        return outputs[position]
    return outputs


def _files(config: TorchConfig) -> list[str]:
    own = [config.model] if config.exported else [config.weights] if config.weights else []
    if not config.exported:  # the code of the factory decides the answers too
        load_object(config.model, "teacher.model")
        source = getattr(sys.modules[config.model.partition(":")[0]], "__file__", None)
        own += [source] if source else []
    return [*own, *config.input.files()]


def _settings(config: TorchConfig) -> str:
    return config.model_dump_json(include={"arguments", "output", "dtype", "input"}, exclude={"input": {"tokenizer"}})


def _made(config: TorchConfig) -> torch.nn.Module:
    module = load_object(config.model, "teacher.model")(**config.arguments)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"teacher.model: {config.model} must return a torch module, got {type(module).__name__}")
    if config.weights is not None:
        try:
            module.load_state_dict(_state_dict(config.weights))
        except RuntimeError as e:
            raise ValueError(f"teacher.weights: {config.weights} does not fit {config.model}: {e}") from e
    return module


def _state_dict(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        loaded: dict[str, torch.Tensor] = load_file(path)
        return loaded
    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(
            f"teacher.weights: {path} is not a state dict of tensors only, which is all that is loaded ({_first_line(e)}); "
            "save module.state_dict() with torch.save, or use safetensors"
        ) from e
    return state


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "tpu":
        try:
            device: torch.device = importlib.import_module("torch_xla").device()
        except ImportError as e:
            raise ValueError("teacher.device: tpu needs torch_xla; install torch_xla[tpu]") from e
        return device
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"teacher.device must be cpu, cuda, cuda:N, tpu or auto, got '{name}'") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"teacher.device: {name} was asked for, but this machine has no CUDA device; use auto or cpu")
    return device


def _fixed_rows(program: torch.export.ExportedProgram) -> int | None:
    """Return the batch size that a program was exported for, or None when it takes any."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            rows = node.meta["val"].shape[0]
            return rows if isinstance(rows, int) else None
    return None


def _padded(inputs: npt.NDArray[Any], rows: int | None) -> npt.NDArray[Any]:
    """Repeat the last row up to the batch size of the program."""
    if rows is None or len(inputs) == rows or not len(inputs):
        return inputs
    return np.concatenate([inputs, np.repeat(inputs[-1:], rows - len(inputs), axis=0)])


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "RESOURCE_EXHAUSTED")
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
