"""Classifiers of Hugging Face transformers as students: DistilBERT, BERT, MiniLM, RoBERTa, ViT, ...

The network is a sequence or image classifier of the transformers library, from a local folder (its weights, with a head for
the student's classes) or of a fresh configuration (random weights). Texts come as ids [B, L] with the tokenizer's padding, from
which the attention mask follows; images as pixels [B, channel, height, width]. Nothing is downloaded, weights are read from
safetensors only, and code in a folder is not executed. What a trained student's folder holds is in `huggingface_files`.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distilbeam.extras import Need, require_extras
from distilbeam.inputs.config import padding_id, vocabulary_size
from distilbeam.student.networks.config import HUGGINGFACE, StudentConfig

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
_SET_HERE = ("num_labels", "id2label", "label2id", "problem_type", "architectures", "transformers_version")


class HuggingFaceNetwork(nn.Module):
    """A classifier of transformers that takes one tensor and gives logits.

    Args:
      model: a sequence or image classifier.
      pad_id: id of the padding of texts; None for images.
    """

    def __init__(self, model: nn.Module, pad_id: int | None) -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of ids int64 [B, L], or of pixels float32 [B, channel, height, width]."""
        if self.pad_id is None:
            return cast("Tensor", self.model(pixel_values=x).logits)
        there_BL = x != self.pad_id
        # a text without a token still needs a place that attention may look at, or its softmax has nothing to sum to
        there_BL = there_BL | (~there_BL.any(1, keepdim=True) & (torch.arange(x.shape[1], device=x.device) == 0))
        return cast("Tensor", self.model(input_ids=x, attention_mask=there_BL.long()).logits)


def huggingface_network(config: StudentConfig, input_shape: tuple[int, ...], num_classes: int) -> HuggingFaceNetwork:
    """Build a student from a local folder or a fresh configuration.

    Args:
      config: of kind `huggingface`.
      input_shape: shape of one example's input.
      num_classes: number of classes C.

    Raises:
      ValueError: transformers is not installed, the folder holds no such model, the configuration is none, or the model does not
        suit the input.
    """
    transformers = quiet_transformers(f"student.kind = '{HUGGINGFACE}'")
    auto = getattr(transformers, head_class(config.input.kind))
    ids = config.input.gives_ids
    pad_id = padding_id(config.input) if ids else None
    if config.model is not None:
        model = _from_folder(transformers, auto, config.model, {"num_labels": num_classes, "pad_token_id": pad_id}, ids)
        _require_processor_seen(config)
    else:
        model = _fresh(transformers, auto, config, input_shape, num_classes, pad_id)
    _require_fit(model, config, input_shape)
    return HuggingFaceNetwork(model, pad_id)


def head_class(kind: str) -> str:
    """Name the class of transformers that has a head for inputs of a kind."""
    return "AutoModelForImageClassification" if kind == "image" else "AutoModelForSequenceClassification"


def first_line(error: Exception) -> str:
    """Give the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def described(transformers: Any, settings: Mapping[str, Any], setting: str = "student.config") -> Any:
    """Make a configuration of transformers of plain settings; names that its class does not know are refused.

    Args:
      transformers: the library.
      settings: with `model_type`.
      setting: their name, for the message.

    Raises:
      ValueError: no `model_type`, an unknown one, or an unknown name.
    """
    rest = dict(settings)
    kind = rest.pop("model_type", None)
    if kind is None:
        raise ValueError(
            f"{setting} must name its model_type, such as distilbert, bert, vit or llama; got {rest or 'nothing'}"
        )
    try:
        default = transformers.AutoConfig.for_model(kind)
    except ValueError as e:
        near = difflib.get_close_matches(str(kind), transformers.CONFIG_MAPPING.keys(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{setting}.model_type must be one that transformers knows, got {kind!r}{hint}") from e
    known = _names(default)
    for name in rest:  # transformers takes any name and does nothing with it
        if name in _SET_HERE or name not in known:
            near = difflib.get_close_matches(name, known, 1)
            why = "is set by the classes" if name in _SET_HERE else f"is not a setting of {kind}"
            raise ValueError(
                f"{setting}.{name} {why}" + (f"; did you mean {near[0]}?" if near and near[0] != name else "")
            )
    try:
        return transformers.AutoConfig.for_model(kind, **rest)
    except Exception as e:  # whatever a configuration checks by itself
        raise ValueError(f"{setting} is none of a {kind}: {first_line(e)}") from e


def _names(config: Any) -> set[str]:
    special = {f"{name}_token_id" for name in ("pad", "bos", "eos")}
    return {*config.to_dict(), *type(config).attribute_map, *special}


def _known(transformers: Any, settings: Mapping[str, Any]) -> set[str]:
    """Give the names that settings of a model type may have; none where there is no such type, which `described` says."""
    kind = settings.get("model_type")
    return _names(transformers.AutoConfig.for_model(kind)) if kind in transformers.CONFIG_MAPPING else set()


def quiet_transformers(setting: str) -> Any:
    """Import transformers, and keep its bars and notes off standard error.

    Args:
      setting: what needs it, for the message.
    """
    for noisy in ("torchao", "torch.utils._pytree"):  # they name libraries that are for other hardware, or of before
        logging.getLogger(noisy).setLevel(logging.ERROR)
    require_extras([Need(setting, "hf", ("transformers",))])
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _from_folder(transformers: Any, auto: Any, folder: str, changes: Mapping[str, Any], ids: bool) -> nn.Module:
    if not (Path(folder) / CONFIG).is_file():
        raise ValueError(f"student.model: {folder} must be a folder with {CONFIG} and safetensors on this disk")
    try:
        told = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        for name, value in changes.items():
            if value is not None:
                setattr(told, name, value)
        model, report = auto.from_pretrained(
            folder,
            config=told,
            use_safetensors=True,
            dtype=torch.float32,  # whatever they are stored in: the training's precision is a setting of its own
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **LOCAL,
        )
    except Exception as e:  # of a damaged folder anything
        what = "text" if ids else "image"
        raise ValueError(f"student.model: {folder} holds no {what} model with safetensors: {first_line(e)}") from e
    body = f"{model.base_model_prefix}."
    lacking = sorted({*report["missing_keys"], *(str(found[0]) for found in report["mismatched_keys"])})
    if own := [name for name in lacking if name.startswith(body) and ".pooler." not in name]:
        raise ValueError(
            f"student.model: {folder} holds no weights for {', '.join(own[:3])}: they would be drawn at random; name the folder of "
            "a trained model, or give its config.json's settings as student.config for random weights"
        )
    return cast("nn.Module", model)


def _fresh(
    transformers: Any,
    auto: Any,
    config: StudentConfig,
    input_shape: tuple[int, ...],
    num_classes: int,
    pad_id: int | None,
) -> nn.Module:
    settings = dict(config.config or {})
    known = _known(transformers, settings)
    if pad_id is not None:
        filled: dict[str, Any] = {"vocab_size": vocabulary_size(config.input), "pad_token_id": pad_id}
    else:
        if config.input.layout != "chw":
            raise ValueError("student.input.layout must be 'chw' for a student of kind 'huggingface', got 'hwc'")
        channels, height, width = input_shape
        filled = {"image_size": height if height == width else [height, width], "num_channels": channels}
    settings = {**{name: value for name, value in filled.items() if name in known}, **settings}
    told = described(transformers, settings)
    told.num_labels = num_classes
    try:
        return cast("nn.Module", auto.from_config(told))
    except Exception as e:  # no such head for it, or sizes that do not fit together
        what = "images" if pad_id is None else "texts"
        raise ValueError(
            f"student.config: transformers makes no classifier of {what} of a {told.model_type}: {first_line(e)}"
        ) from e


def _require_fit(model: Any, config: StudentConfig, input_shape: tuple[int, ...]) -> None:
    """Compare ids and places of a text with the tables of the model."""
    if not config.input.gives_ids:
        return
    table, ids = model.get_input_embeddings(), vocabulary_size(config.input)
    if isinstance(table, nn.Embedding) and table.num_embeddings < ids:
        raise ValueError(
            f"student.input gives ids below {ids:,} and the model has embeddings for {table.num_embeddings:,}: give the tokenizer "
            "that it was trained with"
        )
    places = getattr(model.config, "max_position_embeddings", None)
    if isinstance(places, int) and model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        places -= model.config.pad_token_id + 1  # which count their places from there
    if isinstance(places, int) and places < input_shape[0]:
        raise ValueError(
            f"student.input.max_length must be at most the {places:,} places of the model, got {input_shape[0]:,}"
        )


def _require_processor_seen(config: StudentConfig) -> None:
    """Refuse images that are prepared by nobody's rule while the folder has one."""
    path = Path(config.model or "") / PROCESSOR
    if config.input.kind != "image" or config.input.mean or not path.is_file():
        return
    told = json.loads(path.read_text())
    size = told.get("size") or {}
    sides = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    raise ValueError(
        f"student.input.mean must be given, and std and size: the image processor of {config.model} says mean = "
        f"{told.get('image_mean')}, std = {told.get('image_std')}, size = {sides}"
    )
