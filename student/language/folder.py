"""A trained language model on disk: a Hugging Face folder with its tokenizer, and `student.json` beside, committed by one rename.

    config.json, model.safetensors, generation_config.json, tokenizer.json, ...     AutoModelForCausalLM and AutoTokenizer open it
    student.json     what the labels were, the tokenizer's fingerprint, the training and its figures
    README.md        the same in words

A module of a factory has its weights alone there, and the factory's name, which a reader must trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distilbeam.inputs.tokenizer import TokenizerFolder, load_tokenizer
from distilbeam.storage.atomic import committed_directory
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import DESCRIPTION, WEIGHTS
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.network import CausalLm, build_language_model
from distilbeam.student.training.checkpoints import TrainingDirectory
from distilbeam.student.training.state import Tensors
from distilbeam.student.trust import require_trusted
from distilbeam.teacher.softlabels import SoftLabelSpec

LM_FORMAT = 2  # format 1 is of classifiers, whose readers refuse this one
CARD = "README.md"


@dataclass(frozen=True)
class LanguageModel:
    """A trained student that is a language model.

    Attributes:
      directory: where it is.
      network: in evaluation mode, on the CPU as it is loaded.
      tokenizer: its tokenizer.
      num_classes: ids that its labels knew.
      extra: what the training wanted remembered.
    """

    directory: Path
    network: CausalLm
    tokenizer: TokenizerFolder
    num_classes: int
    extra: Mapping[str, Any]

    @torch.inference_mode()
    def complete(self, text: str, tokens: int = 32) -> str:
        """Continue a text by the most probable token, again and again.

        Args:
          text: at least one token.
          tokens: how many to add at most; the end of the text ends it.

        Returns:
          The text and what was added.
        """
        device = next(self.network.parameters()).device

        def following(ids: list[int]) -> int:
            seen = torch.tensor([ids], device=device)
            hidden = self.network.hidden(seen, torch.ones_like(seen))[:, -1]
            return int(self.network.logits(hidden)[0, : self.num_classes].argmax())

        return self.tokenizer.continued(text, tokens, following)


def save_language_model(
    directory: Path,
    config: LanguageModelConfig,
    network: CausalLm,
    weights: Tensors,
    tokenizer: TokenizerFolder,
    spec: SoftLabelSpec,
    extra: Mapping[str, Any],
    work: TrainingDirectory | None = None,
) -> None:
    """Write a trained student; the directory appears complete or not at all.

    Args:
      directory: where; there is nothing yet.
      config: its configuration.
      network: a whole network of it, whose weights are replaced.
      weights: the trained ones, by their names in `CausalLm`.
      tokenizer: its tokenizer.
      spec: of the labels.
      extra: what else to remember, plain data.
      work: directory of the training, whose figures are handed over; None where there was none.
    """
    network.load_state_dict(weights, strict=False)  # the second name of a tied weight is missing
    saved = {"model": "."} if config.factory is None else {"tokenizer": "."}
    description = {
        "format_version": LM_FORMAT,
        "unit": "token",
        "config": {**config.model_dump(mode="json"), "config": None, "tokenizer": None, **saved},
        "num_classes": spec.num_classes,
        "tokenizer": tokenizer.fingerprint(spec.num_classes),
        "num_parameters": sum(p.numel() for p in network.parameters()),
        "packing": network.packing,
        "labels": json.loads(spec.to_json()),
        "extra": dict(extra),
    }
    with committed_directory(directory) as temporary:
        model: Any = network.model
        if config.factory is None or hasattr(model, "save_pretrained"):
            model.save_pretrained(temporary)
        else:
            tensors = {
                name: value.detach().cpu().contiguous() for name, value in dict(model.named_parameters()).items()
            }
            save_file(tensors, temporary / WEIGHTS)
        tokenizer.tokenizer.save_pretrained(temporary)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        (temporary / CARD).write_text(_card(description))
        if work is not None:
            work.hand_over(temporary)


def load_language_model(directory: str | Path, trust: Sequence[str] = ()) -> LanguageModel:
    """Open a trained student.

    Args:
      directory: written by a training of a language model.
      trust: modules, or `module:name`, whose code the folder may call: its factory.

    Raises:
      ValueError: it holds none, or a classifier, or its weights or tokenizer are others than it says; or it names code that
        nobody trusts (see `student.trust`).
    """
    directory = Path(directory)
    if not is_language_model(directory):
        raise ValueError(
            f"{directory} holds no language model of distilbeam: its {DESCRIPTION} is missing or of a classifier"
        )
    said = read_json(directory / DESCRIPTION)
    if said.get("format_version") != LM_FORMAT:
        raise ValueError(
            f"{directory} has format version {said.get('format_version')!r}, this release reads {LM_FORMAT}"
        )
    config = LanguageModelConfig.model_validate(said["config"])
    factory = config.factory
    if factory is not None:
        require_trusted([factory], directory / DESCRIPTION, trust)
    here = config.model_copy(update={"tokenizer": str(directory)} | ({} if factory else {"model": str(directory)}))
    tokenizer = load_tokenizer(directory, "student.tokenizer")
    tokenizer.require_same(said["tokenizer"], said["num_classes"], "the student's training")
    network = build_language_model(here, tokenizer)
    if factory is not None:
        try:
            tensors = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as e:
            raise ValueError(f"{directory / WEIGHTS} cannot be read: {e}; copy the folder again") from e
        missing = {name for name, _ in network.model.named_parameters()} ^ set(tensors)
        if missing:
            raise ValueError(
                f"{directory / WEIGHTS} does not hold the weights of {factory}: {', '.join(sorted(missing)[:3])} are not in both"
            )
        network.model.load_state_dict(tensors, strict=False)
    network.eval().requires_grad_(requires_grad=False)
    return LanguageModel(directory, network, tokenizer, said["num_classes"], said["extra"])


def is_language_model(directory: Path) -> bool:
    """Tell whether a directory holds a trained language model."""
    path = directory / DESCRIPTION
    found = read_json(path) if path.is_file() else None
    return isinstance(found, dict) and found.get("unit") == "token"


def _card(description: Mapping[str, Any]) -> str:
    labels, metrics = description["labels"], description["extra"].get("metrics", {})
    rows = {
        "parameters": f"{description['num_parameters']:,}",
        "teacher": labels["teacher"],
        "labels": f"{labels['kind']}, k = {labels['k']}, blocks of {labels['sequence_length']:,} tokens",
        "ids": f"{description['num_classes']:,}",
        **{name: f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for name, value in metrics.items()},
    }
    lines = ["# A language model distilled by distilbeam", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    call = (
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")',
        "```",
        "",
        "It has learned the teacher's mistakes as well as its knowledge. Measure it on text of your own before use: `distilbeam "
        "evaluate FOLDER --data LABELS`. Terms of use are those of the teacher and of the text, which this file does not know.",
    )
    return "\n".join([*lines, *call]) + "\n"
