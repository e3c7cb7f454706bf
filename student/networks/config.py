"""Configuration of a student: typed, frozen, validated at construction."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from distilbeam.inputs.config import InputConfig
from distilbeam.settings import Section

KINDS = ("linear", "mlp", "cnn", "resnet", "text", "transformer")
NUMBER_KINDS = ("linear", "mlp", "cnn", "resnet")
NORM_KINDS = ("mlp", "text", "transformer")
RESIDUAL_KINDS = ("resnet", "transformer")  # networks that are known by their residuals
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


class StudentConfig(Section):
    """What the student is and which columns it reads."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str = Field(
        "mlp",
        examples=[*KINDS],
        description="linear, mlp, cnn, resnet, text (an embedding bag), transformer (of token ids), or module:factory "
        "for a network of one's own",
    )
    hidden: tuple[int, ...] = Field((64, 64), description="mlp, text: widths of the hidden layers")
    width: float = Field(1.0, gt=0, le=16, description="multiplier of all channels, hidden layers and embeddings")
    depth: int = Field(20, ge=8, le=2**14, description="resnet: layers, 6n + 2")
    separable: bool = Field(False, description="resnet: depthwise-separable instead of dense convolutions")
    dim: int = Field(128, ge=1, description="text, transformer: size of an embedding")
    layers: int = Field(2, ge=1, le=2**10, description="transformer: blocks of attention and a feed-forward network")
    heads: int = Field(4, ge=1, description="transformer: attention heads, which divide dim")
    feedforward: int = Field(4, ge=1, description="transformer: width of the feed-forward network as a multiple of dim")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping a hidden unit in training")
    residual: Residual = Field(
        "none",
        description="how a layer that keeps its width adds its input: none, plain, laurel-...; without it plain for "
        "resnet and transformer. A layer with no earlier residual of its width leaves pa out",
    )
    norm: Literal["own", "rms"] = Field(
        "own",
        description="own: layer norms in a transformer, none in an mlp; rms: an RMS norm in front of every layer, computed "
        "with the residual before it in one pass (mlp, text, transformer)",
    )
    rank: int = Field(16, ge=1, description="laurel-lr: rank of the learned map")
    previous: int = Field(3, ge=1, description="laurel-pa: how many earlier residuals are added")
    history: Literal["identity", "low-rank"] = Field(
        "identity", description="laurel-pa: earlier residuals as they are, or through a low-rank map each"
    )
    options: dict[str, Any] = Field({}, description="module:factory: further keyword arguments of the factory")
    input: InputConfig = Field(description="which columns become the student's input, and how")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        module, _, factory = kind.partition(":")
        if kind not in KINDS and not (factory.isidentifier() and all(p.isidentifier() for p in module.split("."))):
            raise ValueError(f"kind must be one of {', '.join(KINDS)} or module:factory, got {kind!r}")
        return kind

    @model_validator(mode="before")
    @classmethod
    def _residual_networks_have_residuals(cls, data: Any) -> Any:
        if isinstance(data, dict) and "residual" not in data and data.get("kind") in RESIDUAL_KINDS:
            return {**data, "residual": "plain"}
        return data

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

    @model_validator(mode="after")
    def _network_fits_together(self) -> Self:
        if self.norm == "rms" and self.kind not in NORM_KINDS:
            raise ValueError(
                f"norm 'rms' is for the kinds {', '.join(NORM_KINDS)}, got kind {self.kind!r}: leave it out"
            )
        if self.kind == "resnet" and self.depth % 6 != 2:
            raise ValueError(f"depth of a resnet must be 6n + 2, such as 20, 32, 44, 56 or 110, got {self.depth}")
        if self.kind == "transformer" and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of the {self.heads} heads, got {self.dim}")
        if self.kind == "transformer" and not self.input.gives_sequence:
            raise ValueError(
                "a transformer needs token ids in their order: input of kind 'tokens', or of kind 'text' with a tokenizer"
            )
        if self.kind in NUMBER_KINDS and self.input.gives_ids:
            raise ValueError(f"kind {self.kind!r} needs numbers, its input gives ids; kind 'text' embeds them")
        return self
