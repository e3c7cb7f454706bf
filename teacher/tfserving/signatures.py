"""The signatures of a served model: what it takes and gives, read from its metadata."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distilbeam.teacher.config import TfServingConfig
from distilbeam.teacher.tfserving.calling import Servers
from distilbeam.teacher.tfserving.messages import load_messages

SERVICE = "/tensorflow.serving.PredictionService"
TOP_K = ("top_k_logprobs", "top_k_classes", "tail_logmass", "num_classes")


@dataclass(frozen=True)
class Signature:
    """The part of a signature that a teacher uses.

    Attributes:
      inputs: name of each input: number of its type, and its shape with -1 for unknown sizes (None: unknown rank).
      outputs: names of the outputs to ask for.
      version: version of the model that described itself.
    """

    inputs: dict[str, tuple[int, tuple[int, ...] | None]]
    outputs: tuple[str, ...]
    version: int

    @property
    def sparse(self) -> bool:
        """Whether the server sends the most probable classes only."""
        return self.outputs == TOP_K


def model_spec(config: TfServingConfig, version: int | None = None) -> Any:
    """Say which model is meant.

    Args:
      config: name, signature and version or label.
      version: version, where the configuration leaves it open.
    """
    spec = load_messages().predict.PredictRequest().model_spec
    spec.name = config.model
    spec.signature_name = config.signature
    if config.version_label is not None:
        spec.version_label = config.version_label
    elif (config.version if version is None else version) is not None:
        spec.version.value = config.version if version is None else version
    return spec


def read_signature(servers: Servers, config: TfServingConfig) -> Signature:
    """Ask for the model's metadata and choose input and output.

    Raises:
      ValueError: the model has no such signature, input or output; the message lists those that it has.
      TeacherUnavailable: no server answers, or none has the model.
    """
    messages = load_messages()
    request = messages.metadata.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.CopyFrom(model_spec(config))
    response = servers.call(f"{SERVICE}/GetModelMetadata", request, messages.metadata.GetModelMetadataResponse)
    signatures = messages.metadata.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    names = [name for name in signatures.signature_def if not name.startswith("__")]
    chosen = signatures.signature_def[_one("signature", config.signature, names, config)]
    inputs = {name: (info.dtype, _shape(info)) for name, info in chosen.inputs.items()}
    if config.input_name is not None or len(inputs) == 1:
        name = _one("input_name", config.input_name, inputs, config)
        inputs = {name: inputs[name]}
    return Signature(inputs, _outputs(config, list(chosen.outputs)), response.model_spec.version.value)


def _outputs(config: TfServingConfig, names: list[str]) -> tuple[str, ...]:
    if config.output_name is None and set(TOP_K) <= set(names):
        return TOP_K
    default = "logits" if "logits" in names else None
    return (_one("output_name", config.output_name or default, names, config),)


def _one(setting: str, wanted: str | None, names: Iterable[str], config: TfServingConfig) -> str:
    names = sorted(names)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        what = "must be given" if wanted is None else f"'{wanted}' is unknown"
        raise ValueError(f"teacher.{setting} {what}; model '{config.model}' has {', '.join(names) or 'none'}")
    assert wanted is not None
    return wanted


def _shape(info: Any) -> tuple[int, ...] | None:
    return None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim)
