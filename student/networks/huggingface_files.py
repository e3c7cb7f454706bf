"""The folder of a trained classifier of transformers: config.json, safetensors, and the tokenizer or image processor.

It opens with `AutoModelForSequenceClassification` or `AutoModelForImageClassification`, and in a `pipeline`, without distilbeam.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilbeam.inputs.config import InputConfig, padding_id
from distilbeam.student.networks.config import HUGGINGFACE, StudentConfig
from distilbeam.student.networks.huggingface import (
    LOCAL,
    PROCESSOR,
    HuggingFaceNetwork,
    first_line,
    head_class,
    quiet_transformers,
)

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt")
BILINEAR = 2  # Pillow's number of the filter that `distilbeam.inputs.images` resizes with


def load_files(directory: Path, config: StudentConfig, num_classes: int) -> HuggingFaceNetwork:
    """Open the network of a trained student's folder.

    Args:
      directory: where `write_files` wrote.
      config: the student's configuration, with paths that lead to its files.
      num_classes: number of classes C.

    Raises:
      ValueError: weights are missing, left over or of another shape than config.json says.
    """
    transformers = quiet_transformers(f"student.kind = '{HUGGINGFACE}'")
    auto = getattr(transformers, head_class(config.input.kind))
    options = {**LOCAL, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = auto.from_pretrained(directory, **options)
    except Exception as e:  # of a damaged folder anything
        raise ValueError(f"no model of the transformers library can be read: {first_line(e)}") from e
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise ValueError(f"its {what.replace('_', ' ')} are {', '.join(map(str, sorted(report[what])[:3]))}")
    if model.config.num_labels != num_classes:
        raise ValueError(f"its head has {model.config.num_labels:,} outputs for {num_classes:,} classes")
    return HuggingFaceNetwork(model, padding_id(config.input) if config.input.gives_ids else None)


def write_files(module: nn.Module, config: StudentConfig, classes: Sequence[str], directory: Path) -> StudentConfig:
    """Write a student's network as a Hugging Face folder; its tokenizer.json lies there already.

    Args:
      module: the trained network.
      config: its configuration, with paths that lead to its files.
      classes: names of the classes, which `id2label` gets.
      directory: where.

    Returns:
      The configuration of a student whose model is in its own folder.
    """
    assert isinstance(module, HuggingFaceNetwork)
    model: Any = module.model
    model.config.id2label = dict(enumerate(classes))
    model.config.label2id = {name: place for place, name in enumerate(classes)}
    model.config.problem_type = "single_label_classification"
    model.save_pretrained(directory)
    if config.input.kind == "image":
        (directory / PROCESSOR).write_text(json.dumps(_processor(config.input), indent=2) + "\n")
    elif config.input.tokenizer:
        _write_tokenizer(config.input, module.pad_id, directory)
    return config.model_copy(update={"model": ".", "config": None})


def _processor(config: InputConfig) -> dict[str, Any]:
    """Describe `distilbeam.inputs.images` as an image processor of transformers, which makes the same pixels."""
    size = config.size or (0, 0)
    channels = 3 if config.mode == "RGB" else 1
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": config.size is not None,
        "size": {"height": size[0], "width": size[1]},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255 if config.scale is None else config.scale,
        "do_normalize": bool(config.mean or config.std),
        "image_mean": list(config.mean or (0.0,)) * (channels if len(config.mean) < 2 else 1),
        "image_std": list(config.std or (1.0,)) * (channels if len(config.std) < 2 else 1),
        "do_convert_rgb": config.mode == "RGB",
    }


def _write_tokenizer(config: InputConfig, pad_id: int | None, directory: Path) -> None:
    """Write what `AutoTokenizer` needs beside tokenizer.json: the files beside the one that was given, or a plain class."""
    given = Path(str(config.tokenizer)).parent
    if (given / TOKENIZER_FILES[0]).is_file():
        for name in TOKENIZER_FILES:
            if (given / name).is_file() and given.resolve() != directory.resolve():
                shutil.copyfile(given / name, directory / name)
        return
    import tokenizers

    names = tokenizers.Tokenizer.from_file(str(config.tokenizer))
    padding = None if pad_id is None else names.id_to_token(pad_id)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_length}
    told |= {} if padding is None else {"pad_token": padding}
    (directory / TOKENIZER_FILES[0]).write_text(json.dumps(told, indent=2) + "\n")
