"""Configuration of a student: typed, frozen, validated at construction."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distilbeam.teacher.preprocess import InputConfig

KINDS = ("linear", "mlp", "cnn")
Residual = Literal[
    "none",
    "plain",
    "laurel-rw",
    "laurel-lr",
    "laurel-pa",
    "laurel-rw+lr",
    "laurel-rw+pa",
    "laurel-lr+pa",
    "laurel-rw+lr+pa",
]


class StudentConfig(BaseModel):
    """What the student is and which columns it reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field("mlp", description="linear, mlp, cnn, or module:factory for a network of one's own")
    hidden: tuple[int, ...] = Field((64, 64), description="mlp: widths of the hidden layers")
    width: float = Field(0.25, gt=0, le=8, description="cnn: multiplier of the number of channels")
    dropout: float = Field(0.0, ge=0, lt=1, description="mlp, cnn: probability of dropping a hidden unit in training")
    residual: Residual = Field(
        "none", description="mlp, cnn: how a layer that keeps its width adds its input: none, plain, laurel-..."
    )
    rank: int = Field(16, ge=1, description="laurel-lr: rank of the learned map")
    previous: int = Field(3, ge=1, description="laurel-pa: how many earlier residuals are added")
    options: dict[str, Any] = Field({}, description="module:factory: further keyword arguments of the factory")
    input: InputConfig = Field(description="which columns become the student's input, and how")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        module, _, factory = kind.partition(":")
        if kind not in KINDS and not (factory.isidentifier() and all(p.isidentifier() for p in module.split("."))):
            raise ValueError(f"kind must be one of {', '.join(KINDS)} or module:factory, got {kind!r}")
        return kind

    @field_validator("hidden")
    @classmethod
    def _positive_widths(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden must hold positive widths, got {list(hidden)}")
        return hidden

    @model_validator(mode="after")
    def _options_belong_to_a_factory(self) -> Self:
        if self.options and self.kind in KINDS:
            raise ValueError(f"options are arguments of a module:factory, kind {self.kind!r} takes none")
        return self
