"""Configuration of a student and of its training: typed, frozen, validated at construction."""

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
Objective = Literal["distill", "weighted", "slam", "slam+weighted"]


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


class TrainConfig(BaseModel):
    """How a student is trained; the seed is an argument of the training itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(60, ge=1, le=1_000_000, description="passes over the data")
    batch_size: int = Field(64, ge=1, description="examples per step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd has Nesterov momentum 0.9")
    lr: float = Field(3e-3, gt=0, description="largest learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="of matrices; biases, norms and learned residuals have none")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="the learning rate after the warm-up")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    objective: Objective = Field(
        "distill",
        description="distill; weighted: by the column weight; slam: mixed by the columns alpha and candidates",
    )
    mixing: Literal["plain", "normalised", "forward"] = Field("normalised", description="slam: form of the mixture")
    temperature: float = Field(1.0, gt=0, description="softens teacher and student")
    hard_weight: float = Field(
        1.0, ge=0, description="weight of a human-labelled example beside a soft-labelled one's 1"
    )
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation loss before training stops"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the student's forward and backward pass")
    device: str = Field("cpu", description="cpu, cuda, cuda:1, tpu, ...; auto takes the accelerator if there is one")
