"""A teacher that is a PyTorch model in this process.

Nothing is unpickled and no code of a file is run: programs are looked into before torch reads them (`programs`), weights
are read by safetensors or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.inputs.config import load_object
from distilbeam.teacher.backends.local import LocalTeacher, first_line, function_sources, select_output
from distilbeam.teacher.config import TorchConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Inputs, count_rows
from distilbeam.teacher.programs import load_program, training_operator
from distilbeam.teacher.sources import argument_files, source_files


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
        super().__init__(f"torch:{name}", Artefact(_files(config), _settings(config)), config)
        self.repeats_itself = "asked" if config.exported else "unsuspected"
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
        program = load_program(self._config.model, "teacher.model", trust=self._config.trust)
        operator = training_operator(program)
        if operator is not None:
            raise ValueError(
                f"teacher.model: {self._config.model} was exported in training mode: its {operator} changes the answers at "
                "random or by the rows beside them; call model.eval() before torch.export.export"
            )
        return program.module().to(device=self._device, dtype=self._dtype), _fixed_rows(program)

    def _state(self) -> object:
        return torch_state(self._model, self._device)

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        model = self._require_open()
        if isinstance(inputs, np.ndarray):
            outputs = model(self._tensor(inputs))
        else:
            outputs = model(**{name: self._tensor(array) for name, array in inputs.items()})
        answer = as_numpy(select_output(outputs, self._config.output))
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
    sources = [] if config.exported else source_files(config.model, "teacher.model")
    # the code of the factory decides the answers too; what former versions left out comes last, so that the fingerprints
    # of those without it stay
    more = [*sources[1:], *argument_files(config.arguments), *function_sources(config.input)]
    return [*own, *sources[:1], *config.input.files(), *more]


def _settings(config: TorchConfig) -> str:
    settings = {"arguments", "output", "dtype", "input"}
    data = config.model_dump(mode="json", include=settings, exclude={"input": {"tokenizer"}})
    return (
        json.dumps(data, sort_keys=True) + config.meaning()
    )  # the order in which somebody wrote the arguments decides nothing


def _made(config: TorchConfig) -> torch.nn.Module:
    factory = load_object(config.model, "teacher.model")
    try:
        module = factory(**config.arguments)
    except TypeError as e:
        raise ValueError(f"teacher.arguments do not suit {config.model}: {first_line(e)}") from e
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"teacher.model: {config.model} must return a torch module, got {type(module).__name__}")
    if config.weights is not None:
        try:
            module.load_state_dict(_state_dict(config.weights))
        except (AttributeError, RuntimeError, TypeError) as e:
            raise ValueError(f"teacher.weights: {config.weights} does not fit {config.model}: {e}") from e
    return module


def _state_dict(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            loaded: dict[str, torch.Tensor] = load_file(path)
        except (SafetensorError, OSError, ValueError) as e:
            raise ValueError(
                f"teacher.weights: {path} is damaged or no safetensors file ({first_line(e)}); copy or save it again"
            ) from e
        return loaded
    try:
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(
            f"teacher.weights: {path} is not a state dict of tensors only, which is all that is loaded ({first_line(e)}); "
            "save module.state_dict() with torch.save, or use safetensors"
        ) from e
    return state


def as_numpy(answer: Any) -> npt.NDArray[Any]:
    """Return a model's answer as an array in single precision, or in double where that is its own."""
    if not isinstance(answer, torch.Tensor):
        return np.asarray(answer)
    array: npt.NDArray[Any] = (answer if answer.dtype == torch.float64 else answer.float()).cpu().numpy()
    return array


def torch_state(model: Any, device: torch.device) -> object:
    """Describe what a forward pass leaves as it is: the generators of random numbers, and the model's own numbers."""
    generators = [torch.get_rng_state()]
    if device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(device))
    buffers = model.buffers() if isinstance(model, torch.nn.Module) else ()
    versions = [buffer._version for buffer in buffers if not buffer.is_inference()]
    return [generator.numpy().tobytes() for generator in generators], versions


def find_device(name: str, setting: str = "teacher.device") -> torch.device:
    """Find a device by its name in the configuration.

    Args:
      name: cpu, cuda, cuda:N, tpu or auto.
      setting: what holds the name, for the message.

    Raises:
      ValueError: there is no such device, or its library is not installed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "tpu":
        try:
            device: torch.device = importlib.import_module("torch_xla").device()
        except ImportError as e:
            raise ValueError(f"{setting}: tpu needs torch_xla; install torch_xla[tpu]") from e
        return device
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"{setting} must be cpu, cuda, cuda:N, tpu or auto, got '{name}'") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{setting}: {name} was asked for, but this machine has no CUDA device; use auto or cpu")
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
