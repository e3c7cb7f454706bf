"""Train a language model over token labels, in one process or several, from a TOML file.

distilbeam launch training.toml
torchrun --nproc-per-node 2 -m distilbeam launch training.toml --set training.lr=0.001

[data]                              # paths are relative to the file
soft_labels = ["job/labels"]        # of blocks, from a teacher of kind causal_lm
validation = "held-out/labels"      # optional: bits per byte after each epoch
directory = "student"
seed = 0

[student]
kind = "causal_lm"
model = "small-model"               # or config = { model_type = "llama", ... } and tokenizer = "teacher"

[training]
batch_size = 16
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilbeam.progress import Progress
from distilbeam.settings import folder_of, read_settings, validated
from distilbeam.student.language.config import TokenLaunchConfig
from distilbeam.student.language.train import train_language_model
from distilbeam.student.training.train import TrainResult


def train_file(config: Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> TrainResult:
    """Train what a file says, as one of the processes that torchrun started or alone.

    Args:
      config: the TOML file; relative paths start at its folder.
      overrides: words `section.key=value`, or `@FILE`.
      progress: as for `train_language_model`.

    Raises:
      ValueError: a setting is not valid; a line for each; and as for `train_language_model`.
      FileExistsError: the student is there already.
    """
    settings = validated(TokenLaunchConfig, read_settings(config, overrides)).relative_to(folder_of(config))
    data = settings.data
    return train_language_model(
        settings.student,
        settings.training,
        soft_labels=data.soft_labels,
        validation=data.validation,
        directory=data.directory,
        seed=data.seed,
        mixing_weights=data.mixing_weights,
        progress=progress,
    )
