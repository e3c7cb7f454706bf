"""Configuration of teachers that label the tokens of blocks: a local language model, and one behind a server."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.inputs.config import InputConfig
from distilbeam.teacher.kind_config import HeaderConfig, KindSection, PathText


class CausalLMConfig(KindSection):
    """A causal language model of transformers in a local folder, which labels the tokens of blocks."""

    kind: Literal["causal_lm"] = Field("causal_lm", description="a language model of transformers (extra: hf)")
    model: PathText = Field(description="folder with config.json, safetensors and the tokenizer")
    device: str = Field("auto", description="cpu, cuda, cuda:1, tpu, or auto for CUDA where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="type that the model computes in")
    batch_tokens: int = Field(
        8192, ge=1, description="most tokens in one forward pass, a block at least; halved when memory runs out"
    )

    @property
    def input(self) -> InputConfig:
        """The columns of a block."""
        return InputConfig(columns=BLOCK_COLUMNS)

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("model",)


class OpenAIConfig(KindSection):
    """A language model behind a server of vLLM or SGLang, which labels the tokens of blocks (top-k alone)."""

    kind: Literal["openai"] = Field("openai", description="a language model behind vLLM or SGLang (extra: hf)")
    address: str = Field(description="of the server, such as http://host:8000")
    api: Literal["vllm", "sglang"] = Field("vllm", description="vllm asks /v1/completions, sglang asks /generate")
    model: str = Field(min_length=1, description="name of the model at the server")
    tokenizer: PathText = Field(description="folder of the model's tokenizer")
    version: str = Field("", description="text to change when the answers change, such as the weights' revision")
    max_length: int | None = Field(
        None, ge=2, description="most tokens of a prompt; one less than vLLM's --max-model-len"
    )
    parallel: int = Field(16, ge=1, le=1024, description="most requests in flight, each of one text of a block")
    timeout_s: float = Field(120.0, gt=0, le=86_400, description="deadline of one attempt, in seconds")
    attempts: int = Field(6, ge=1, description="attempts at a request whose failure can pass")
    first_wait_s: float = Field(
        0.5, gt=0, le=86_400, description="longest wait before the second attempt, in seconds; doubled each time"
    )
    longest_wait_s: float = Field(60.0, gt=0, le=86_400, description="longest wait between attempts, in seconds")
    headers: dict[str, HeaderConfig] = Field({}, description="headers of each request, such as authorization")

    @field_validator("address")
    @classmethod
    def _is_http(cls, address: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", address):
            raise ValueError(f"address must be http://host:port or https://..., got {address!r}")
        return address.rstrip("/")

    @property
    def input(self) -> InputConfig:
        """The columns of a block."""
        return InputConfig(columns=BLOCK_COLUMNS)

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("tokenizer",)
