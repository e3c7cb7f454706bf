"""Configuration of a training: typed, frozen, validated at construction."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["distill", "weighted", "slam", "slam+weighted"]


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
