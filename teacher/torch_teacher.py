"""A teacher that is a PyTorch model in this process.

Nothing is unpickled: programs are read by `torch.export.load`, weights by safetensors or by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.teacher.artefact import Artefact
from distilbeam.teacher.config import TorchConfig
from distilbeam.teacher.halving import Inputs, count_rows
from distilbeam.teacher.local import LocalTeacher, first_line, select_output
from distilbeam.teacher.preprocess import load_object


class TorchTeacher(LocalTeacher):
    """Answers with a PyTorch model.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: a file, module, device or output that the configuration names cannot be used.
    """

    def __init__(self, config: TorchConfig) -> None:
        self._config = config
        self._device = find_device(config.device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        name = Path(config.model).name if config.exported else config.model
        super().__init__(f"torch:{name}", Artefact(_files(config), _settings(config)), config.input, config.batch_rows)
        self._model, self._fixed_rows = self._load()
        if self._fixed_rows is not None:
            self.set_batch_rows(self._fixed_rows)

    @property
    def num_parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(p.numel() for p in self._model.parameters()) if isinstance(self._model, torch.nn.Module) else 0

    def _load(self) -> tuple[Any, int | None]:
        if not self._config.exported:
            return _made(self._config).to(device=self._device, dtype=self._dtype).eval(), None
        try:
            program = torch.export.load(self._config.model)
        except Exception as e:
            raise ValueError(
                f"teacher.model: {self._config.model} is not a torch.export program: {first_line(e)}"
            ) from e
        return program.module().to(device=self._device, dtype=self._dtype), _fixed_rows(program)

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        model = self._require_open()
        if isinstance(inputs, np.ndarray):
            outputs = model(self._tensor(inputs))
        else:
            outputs = model(**{name: self._tensor(array) for name, array in inputs.items()})
        answer: npt.NDArray[np.float32] = select_output(outputs, self._config.output).float().cpu().numpy()
        return answer if self._fixed_rows is None else answer[: count_rows(inputs)]

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        padded = _padded(array, self._fixed_rows)
        tensor = torch.from_numpy(padded if padded.flags.writeable else padded.copy())
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _out_of_memory(self, error: Exception) -> bool:
        return torch_out_of_memory(error)

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _files(config: TorchConfig) -> list[str]:
    own = [config.model] if config.exported else [config.weights] if config.weights else []
    if not config.exported:  # the code of the factory decides the answers too
        load_object(config.model, "teacher.model")
        source = getattr(sys.modules[config.model.partition(":")[0]], "__file__", None)
        own += [source] if source else []
    return [*own, *config.input.files()]


def _settings(config: TorchConfig) -> str:
    settings = {"arguments", "output", "dtype", "input"}
    data = config.model_dump(mode="json", include=settings, exclude={"input": {"tokenizer"}})
    return json.dumps(data, sort_keys=True)  # the order in which somebody wrote the arguments decides nothing


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
            f"teacher.weights: {path} is not a state dict of tensors only, which is all that is loaded ({first_line(e)}); "
            "save module.state_dict() with torch.save, or use safetensors"
        ) from e
    return state


def find_device(name: str) -> torch.device:
    """Find a device by its name in the configuration.

    Raises:
      ValueError: there is no such device, or its library is not installed.
    """
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


def torch_out_of_memory(error: Exception) -> bool:
    """Tell whether an exception of torch means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory", "RESOURCE_EXHAUSTED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
