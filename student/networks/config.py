"""Configuration of a student: typed, frozen, validated at construction."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from distilbeam.inputs.config import InputConfig
from distilbeam.settings import Section

HUGGINGFACE = "huggingface"
KINDS = ("linear", "mlp", "cnn", "resnet", "text", "transformer", HUGGINGFACE)
NUMBER_KINDS = ("linear", "mlp", "cnn", "resnet")
NORM_KINDS = ("mlp", "text", "transformer")
TEXT_HIDDEN: tuple[int, ...] = ()
# of hashed n-grams as a vector; benchmarks/text_students.py measured what they are worth
TEXT_INPUT: dict[str, Any] = {"analyzer": "char_wb", "ngrams": (2, 4), "buckets": 8192}
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


class EncoderConfig(Section):
    """A sentence encoder, which the embeddings of a text student are regressed on before it is trained."""

    model_config = ConfigDict(allow_inf_nan=False)

    folder: str | None = Field(
        None, description="folder of a Hugging Face encoder: config.json, tokenizer, safetensors"
    )
    column: str | None = Field(None, description="instead of a folder: column of the pool with the encoder's vectors")
    rows: int = Field(
        65_536, ge=1, description="most rows of the pool that are encoded; of more they are drawn by chance"
    )
    ridge: float = Field(3.0, gt=0, description="rows in which an n-gram must stand to be believed by half")
    max_length: int = Field(128, ge=1, description="folder: tokens of a text that the encoder reads")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("folder",)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.column is None):
            raise ValueError("encoder must have folder or column, one of them")
        return self


class StudentConfig(Section):
    """What the student is and which columns it reads."""

    model_config = ConfigDict(allow_inf_nan=False)

    kind: str = Field(
        "mlp",
        examples=[*KINDS],
        description="linear, mlp, cnn, resnet, text (an embedding bag), transformer (of token ids), huggingface (a classifier of "
        "transformers: DistilBERT, BERT, ViT, ...), or module:factory for a network of one's own",
    )
    model: str | None = Field(
        None,
        description="huggingface: local folder whose weights the student starts from, with config.json and safetensors; its "
        "head is drawn anew unless it has as many classes",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="huggingface: instead of a folder, settings of transformers for a network of random weights: model_type "
        "(distilbert, bert, vit, ...) and what differs from its defaults; vocabulary, image size and classes are filled in",
    )
    hidden: tuple[int, ...] = Field(
        (64, 64), description="mlp, text: widths of the hidden layers; none for text by default"
    )
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
    init: Literal["random", "encoder"] = Field(
        "random",
        description="text: initial embeddings: random, or so that bags of n-grams lie where a sentence encoder puts their texts",
    )
    encoder: EncoderConfig | None = Field(None, description="text: the sentence encoder of init = 'encoder'")
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

    @model_validator(mode="before")
    @classmethod
    def _texts_have_defaults_of_their_own(cls, data: Any) -> Any:
        """Fill in what is not said of a text student; folders of students say everything, and stay what they are."""
        if not (isinstance(data, dict) and data.get("kind") == "text"):
            return data
        data = {"hidden": TEXT_HIDDEN, **data}
        inputs = data.get("input")
        if isinstance(inputs, dict) and inputs.get("kind") == "text" and not inputs.get("tokenizer"):
            own = set(TEXT_INPUT) if inputs.get("ngram_form", "vector") != "vector" else set(inputs)
            own |= {"analyzer", "ngrams"} if own & {"analyzer", "ngrams"} else set()  # they belong together
            data["input"] = {**{name: value for name, value in TEXT_INPUT.items() if name not in own}, **inputs}
        return data

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",)

    @model_validator(mode="before")
    @classmethod
    def _folders_have_tokenizers(cls, data: Any) -> Any:
        """Read texts with the tokenizer of the folder unless another is named."""
        if not (isinstance(data, dict) and data.get("kind") == HUGGINGFACE and data.get("model")):
            return data
        inputs = data.get("input")
        if isinstance(inputs, dict) and inputs.get("kind") == "text" and not inputs.get("tokenizer"):
            data = {**data, "input": {**inputs, "tokenizer": str(Path(data["model"]) / "tokenizer.json")}}
        return data

    @model_validator(mode="after")
    def _transformers_know_what_they_read(self) -> Self:
        if self.kind != HUGGINGFACE:
            if self.model is not None or self.config is not None:
                raise ValueError(f"model and config are for students of kind '{HUGGINGFACE}', got kind {self.kind!r}")
            return self
        if (self.model is None) == (self.config is None):
            raise ValueError(f"a student of kind '{HUGGINGFACE}' must have model, a folder, or config, one of them")
        if self.input.kind not in ("text", "tokens", "image") or (
            self.input.gives_ids and not self.input.gives_sequence
        ):
            raise ValueError(
                f"a student of kind '{HUGGINGFACE}' reads text with a tokenizer, tokens or image, got an input of kind "
                f"{self.input.kind!r}"
            )
        if self.input.kind == "text" and not self.input.tokenizer:
            raise ValueError(
                f"input.tokenizer must be given for a student of kind '{HUGGINGFACE}' of a fresh config: the tokenizer.json of its texts"
            )
        if self.input.kind == "image" and (self.input.size is None or self.input.resize != "stretch"):
            raise ValueError(
                f"input.size must be given for images of a student of kind '{HUGGINGFACE}', with resize = 'stretch': the image "
                f"processor in its folder does the same; got size {self.input.size} and resize {self.input.resize!r}"
            )
        return self

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
    def _encoder_is_for_bags(self) -> Self:
        if (self.init == "encoder") != (self.encoder is not None):
            raise ValueError("encoder must be given with init = 'encoder', and only with it")
        if self.encoder is not None and (self.kind != "text" or self.input.kind not in ("text", "tokens")):
            raise ValueError(
                f"init = 'encoder' is for students of kind 'text' that read text, got kind {self.kind!r} and input of kind "
                f"{self.input.kind!r}; leave init and encoder out"
            )
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
