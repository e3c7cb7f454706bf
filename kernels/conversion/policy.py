"""Which layers of a student run in 8 bits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LowPrecisionPolicy(BaseModel):
    """What `to_low_precision` does to a student's linear layers; every other layer keeps its precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["fp8", "int8"] = Field(description="fp8: e4m3; int8; both with a scale per row")
    backend: Literal["distilbeam", "torchao"] = Field("distilbeam", description="whose layers replace torch's")
    gate: Literal["table", "sizes"] = Field(
        "table", description="table: layers that 8 bits make faster on their device; sizes: all of the sizes below"
    )
    rows: int | None = Field(
        None, ge=1, description="rows of a step, examples times positions; the table needs them to judge a layer"
    )
    min_inputs: int = Field(16, ge=1, description="fewest inputs of a layer that is converted")
    min_outputs: int = Field(16, ge=1, description="fewest outputs")
    multiple_of: int = Field(
        16, ge=1, description="inputs and outputs must be multiples of it; tensor cores take multiples of 16"
    )
    skip: tuple[str, ...] = Field(
        (), description="names of layers that stay as they are; * stands for anything, as in blocks.*.attention"
    )
    keep_last: bool = Field(True, description="leave the last linear layer, which gives the logits, as it is")
    gradients: Literal["bf16", "fp8"] | None = Field(
        None, description="what the backward products are made of; None: fp8 for fp8, bf16 for int8, which has no other"
    )
