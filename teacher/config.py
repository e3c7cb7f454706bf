"""Configuration of teachers: the section `[teacher]`, one class for each `kind`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from distilbeam.teacher.preprocess import InputConfig


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def relative_to(self, base: Path) -> Self:
        """Return the configuration with relative paths resolved against a folder."""
        updates: dict[str, Any] = {}
        for name in self.paths():
            value = getattr(self, name)
            if value is not None:
                updates[name] = str(base / value)
        if getattr(self, "input", None) is not None:
            updates["input"] = self.input.relative_to(base)  # type: ignore[attr-defined]
        return self.model_copy(update=updates)

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ()


class TorchConfig(_Config):
    """A PyTorch model: an exported program, or a function that makes a module and a file with its weights."""

    kind: Literal["torch"] = "torch"
    model: str = Field(description="a torch.export program (.pt2), or 'module:factory'")
    weights: str | None = Field(
        None, description="weights for a factory: .safetensors, or a state dict of tensors only"
    )
    arguments: dict[str, Any] = Field({}, description="keyword arguments of the factory")
    input: InputConfig = Field(description="what the model reads")
    output: str | int | None = Field(None, description="name or position of the logits among several outputs")
    device: str = Field("auto", description="cpu, cuda, cuda:1, tpu, or auto for CUDA where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type that the model computes in")
    batch_rows: int | None = Field(None, ge=1, description="most rows in one forward pass; halved when memory runs out")

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.exported and (self.weights or self.arguments):
            raise ValueError("weights and arguments must be left out for a .pt2 program, which contains them")
        return self

    @property
    def exported(self) -> bool:
        """Whether the model is an exported program."""
        return self.model.endswith(".pt2")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",) if self.exported else ("weights",)


TeacherConfig = TorchConfig


def parse_teacher_config(data: Any) -> TeacherConfig:
    """Validate a configuration given as plain data, as a TOML file has it.

    Raises:
      pydantic.ValidationError: a `ValueError` that names each setting that is not valid.
    """
    config: TeacherConfig = TypeAdapter[TeacherConfig](TeacherConfig).validate_python(data)
    return config
