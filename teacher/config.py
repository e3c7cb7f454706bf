"""Configuration of teachers: the section `[teacher]`, one class for each `kind`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.inputs.config import InputConfig
from distilbeam.settings import Section, folder_of, read_toml, validated
from distilbeam.teacher.kind_config import Arguments, PathText, RowTeacherConfig
from distilbeam.teacher.kind_config import HeaderConfig as HeaderConfig
from distilbeam.teacher.token_config import CausalLMConfig as CausalLMConfig
from distilbeam.teacher.token_config import OpenAIConfig as OpenAIConfig


class TorchConfig(RowTeacherConfig):
    """A PyTorch model: an exported program, or a function that makes a module and a file with its weights."""

    kind: Literal["torch"] = Field("torch", description="a PyTorch model in this process")
    model: PathText = Field(description="a torch.export program (.pt2), or 'module:factory'")
    weights: PathText | None = Field(
        None, description="weights for a factory: .safetensors, or a state dict of tensors only"
    )
    arguments: Arguments = Field({}, description="keyword arguments of the factory")
    input: InputConfig = Field(description="what the model reads")
    output: str | int | None = Field(None, description="name or position of the logits among several outputs")
    device: str = Field("auto", description="cpu, cuda, cuda:1, tpu, or auto for CUDA where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type that the model computes in")
    batch_rows: int | None = Field(None, ge=1, description="most rows in one forward pass; halved when memory runs out")
    trust: bool = Field(False, description="also open a .pt2 file that could run code while it is read: it is yours")

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


class TfServingConfig(RowTeacherConfig):
    """A model behind TensorFlow Serving's gRPC PredictionService, or behind `distilbeam serve-teacher`."""

    kind: Literal["tfserving"] = Field("tfserving", description="a model behind a gRPC server")
    addresses: tuple[str, ...] = Field(
        description="host:port of the servers, asked in turn; `address` may name one", min_length=1
    )
    model: str = Field(description="name of the model", min_length=1)
    version: int | None = Field(None, ge=0, description="version; without it or a label, the server's newest")
    version_label: str | None = Field(None, description="label of the version, such as stable")
    signature: str = Field("serving_default", description="name of the signature")
    input_name: str | None = Field(None, description="input of the signature; needed when there are several")
    output_name: str | None = Field(
        None, description="output with the logits; needed when there are several, none called logits"
    )
    input: InputConfig = Field(description="what is sent; kind raw sends text and bytes as they are")
    batch_rows: int = Field(256, ge=1, description="most rows in one request")
    batch_bytes: int = Field(3 * 2**20, ge=1, description="most bytes of input in one request")
    parallel: int = Field(4, ge=1, le=256, description="most requests in flight")
    timeout_s: float = Field(30.0, gt=0, le=86_400, description="deadline of one attempt, in seconds")
    attempts: int = Field(6, ge=1, description="attempts at a request whose failure can pass")
    first_wait_s: float = Field(
        0.25, gt=0, le=86_400, description="longest wait before the second attempt, in seconds; doubled each time"
    )
    longest_wait_s: float = Field(30.0, gt=0, le=86_400, description="longest wait between attempts, in seconds")
    max_message_bytes: int = Field(64 * 2**20, ge=1024, description="largest message sent or received")
    tls: bool = Field(False, description="encrypt; certificates of the system are trusted unless ca_file is given")
    ca_file: str | None = Field(None, description="certificate of the authority that signed the server's")
    cert_file: str | None = Field(None, description="our certificate, for servers that ask for one")
    key_file: str | None = Field(None, description="the key of our certificate")
    server_name: str | None = Field(None, description="name in the server's certificate when it is not the address")
    headers: dict[str, HeaderConfig] = Field({}, description="headers of each request, such as authorization")
    probe_shape: tuple[int, ...] | None = Field(None, description="shape of one input, when the model does not say it")
    probe_text: str = Field("a question", description="text or bytes that a model of text is fingerprinted with")
    probe_tolerance: float = Field(
        1e-3, gt=0, allow_inf_nan=False, description="largest difference in a repeated answer that is no change"
    )

    @model_validator(mode="before")
    @classmethod
    def _address_is_addresses(cls, data: Any) -> Any:
        if isinstance(data, dict) and "address" in data:
            if "addresses" in data:
                raise ValueError("address and addresses must not both be given")
            data = {**data, "addresses": [data["address"]]}
            del data["address"]
        return data

    @field_validator("addresses")
    @classmethod
    def _named_addresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            if not address.strip() or any(c.isspace() or not c.isprintable() for c in address):
                raise ValueError(f"an address must be host:port, got {address!r}")
        return addresses

    @field_validator("probe_shape")
    @classmethod
    def _positive_shape(cls, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if shape is not None and (not shape or min(shape) < 1):
            raise ValueError(f"probe_shape must be positive whole numbers, got {list(shape)}")
        return shape

    @field_validator("headers")
    @classmethod
    def _as_metadata(cls, headers: dict[str, HeaderConfig]) -> dict[str, HeaderConfig]:
        """Write the names as gRPC sends them, in small letters."""
        for name in headers:
            if not re.fullmatch(r"[0-9a-z_.-]+", name.lower(), re.ASCII) or name.lower().startswith(("grpc-", ":")):
                raise ValueError(f"a header must be named by letters, digits, '-', '_' and '.', got {name!r}")
            if name.lower().endswith("-bin"):
                raise ValueError(
                    f"a header must hold text, {name!r} would be sent as bytes: choose a name without -bin"
                )
        if len({name.lower() for name in headers}) < len(headers):
            raise ValueError(f"headers must be named once, in capitals or not, got {', '.join(headers)}")
        return {name.lower(): header for name, header in headers.items()}

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.version is not None and self.version_label is not None:
            raise ValueError("version and version_label must not both be given")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together")
        if not self.tls and (self.ca_file or self.cert_file or self.server_name):
            raise ValueError("ca_file, cert_file, key_file and server_name need tls = true")
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("ca_file", "cert_file", "key_file")


class OnnxConfig(RowTeacherConfig):
    """An ONNX model, run by ONNX Runtime."""

    kind: Literal["onnx"] = Field("onnx", description="an ONNX model in this process (extra: onnx)")
    model: PathText = Field(description="the .onnx file")
    input: InputConfig = Field(description="what the model reads")
    output: str | None = Field(None, description="name of the output with the logits, when there are several")
    providers: tuple[str, ...] = Field((), description="execution providers in order of preference; all that there are")
    threads: int | None = Field(None, ge=1, le=4096, description="threads of one operation; ONNX Runtime's choice")
    batch_rows: int | None = Field(None, ge=1, description="most rows at a time; halved when memory runs out")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",)


class SavedModelConfig(RowTeacherConfig):
    """A TensorFlow SavedModel in this process."""

    kind: Literal["savedmodel"] = Field("savedmodel", description="a TensorFlow SavedModel in this process")
    model: PathText = Field(description="folder of the SavedModel")
    signature: str = Field("serving_default", description="name of the signature")
    input: InputConfig = Field(description="what the model reads; kind raw passes text and bytes on")
    output: str | None = Field(None, description="name of the output with the logits, when there are several")
    batch_rows: int | None = Field(None, ge=1, description="most rows at a time; halved when memory runs out")
    trust: bool = Field(False, description="also open a model that reads or writes files or calls Python: it is yours")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",)


class HuggingFaceConfig(RowTeacherConfig):
    """A sequence or image classification model of transformers in a local folder."""

    kind: Literal["huggingface"] = Field("huggingface", description="a classifier of transformers (extra: hf)")
    model: PathText = Field(description="folder with config.json, safetensors and the tokenizer or image processor")
    input: InputConfig = Field(description="the column; of kind text or image, prepared by the model's own files")
    max_length: int | None = Field(None, ge=1, description="most tokens of a text; the tokenizer's own limit")
    device: str = Field("auto", description="cpu, cuda, cuda:1, tpu, or auto for CUDA where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type that the model computes in")
    batch_rows: int | None = Field(None, ge=1, description="most rows at a time; halved when memory runs out")

    @model_validator(mode="after")
    def _text_or_image(self) -> Self:
        if self.input.kind not in ("text", "image"):
            raise ValueError(f"input.kind must be text or image for a Hugging Face teacher, got {self.input.kind}")
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",)


class BeamConfig(RowTeacherConfig):
    """Any Apache Beam ModelHandler; with a tokenizer one of a language model, which labels the tokens of blocks (top-k alone)."""

    kind: Literal["beam"] = Field("beam", description="a ModelHandler of Apache Beam")
    handler: PathText = Field(description="'module:factory' of the ModelHandler")
    arguments: Arguments = Field({}, description="keyword arguments of the factory")
    input: InputConfig = Field(description="what the handler's examples are made of; left out with a tokenizer")
    examples: Literal["numpy", "torch", "tensorflow", "batch"] = Field(
        "numpy",
        description="what run_inference takes: a list of rows as arrays or tensors, or the Arrow batch as one example",
    )
    output: str | int | None = Field(None, description="name of the logits when an inference is a mapping")
    files: tuple[PathText, ...] = Field(
        (), description="files and folders that the handler loads; the fingerprint hashes them"
    )
    version: str | None = Field(None, description="text to change when the answers change, where there are no files")
    batch_rows: int | None = Field(None, ge=1, description="most rows at a time; the handler's own limit")
    tokenizer: PathText | None = Field(
        None, description="folder of a tokenizer: the handler is of a language model and answers prompts as vLLM does"
    )
    max_length: int | None = Field(None, ge=2, description="most tokens that it reads, with a tokenizer")

    @model_validator(mode="before")
    @classmethod
    def _prompts_are_of_blocks(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("tokenizer") is not None and "input" not in data:
            return {**data, "input": {"columns": list(BLOCK_COLUMNS)}}
        return data

    @model_validator(mode="after")
    def _can_be_identified(self) -> Self:
        if not self.files and self.version is None:
            raise ValueError("files or version must be given, so that the labels of another model are told apart")
        if self.tokenizer is None and self.max_length is not None:
            raise ValueError("max_length must be left out without a tokenizer")
        usual = {"input": InputConfig(columns=BLOCK_COLUMNS), "examples": "numpy", "output": None}
        usual |= {"answers": "logits", "classes": ()}
        given = [name for name, value in usual.items() if getattr(self, name) != value]
        if self.tokenizer is not None and given:
            raise ValueError(
                f"{given[0]} must be left out with a tokenizer: the handler is given the ids of texts, and answers as vLLM does"
            )
        return self

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("files", "tokenizer")


TeacherConfig = Annotated[
    BeamConfig
    | CausalLMConfig
    | HuggingFaceConfig
    | OnnxConfig
    | OpenAIConfig
    | SavedModelConfig
    | TfServingConfig
    | TorchConfig,
    Field(discriminator="kind"),
]


def labels_tokens(config: TeacherConfig) -> bool:
    """Say whether a teacher labels the tokens of blocks; others label rows."""
    return config.kind in ("causal_lm", "openai") or (config.kind == "beam" and config.tokenizer is not None)


def parse_teacher_config(data: Any) -> TeacherConfig:
    """Validate a configuration given as plain data, as a TOML file has it.

    Args:
      data: the section `[teacher]`.

    Returns:
      The configuration.

    Raises:
      ValueError: settings that are not valid, one sentence and line for each.
    """
    return validated(_WithTeacher, {"teacher": data}).teacher


def read_teacher_config(path: Path) -> TeacherConfig:
    """Read the section `[teacher]` of a TOML file, such as a run's configuration.

    Args:
      path: the TOML file; its folder is where relative paths start.

    Returns:
      The configuration, with absolute paths.

    Raises:
      ValueError: the file cannot be read, has no such section, or one with settings that are not valid.
    """
    data = read_toml(path)
    if not isinstance(data.get("teacher"), dict):
        raise ValueError(f"{path} must have a section [teacher]")
    return parse_teacher_config(data["teacher"]).relative_to(folder_of(path))


class _WithTeacher(Section):
    """A file's section [teacher] alone, so that settings are named as in the file."""

    teacher: TeacherConfig
