"""Configuration of searches over students: `[tune]`, its ranges, and `[pareto]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from distilbeam.settings import Section
from distilbeam.student.networks.config import StudentConfig

Strategy = Literal["shrink-and-improve", "grow-improve-and-shrink"]
Compression = Literal["int8", "int8-weights"]


class SearchRange(Section):
    """Values that a setting may take: from `low` to `high`, whole numbers if both are, or one of `choices`."""

    model_config = ConfigDict(allow_inf_nan=False)

    low: int | float | None = Field(None, description="least value")
    high: int | float | None = Field(None, description="greatest value")
    log: bool = Field(False, description="draw evenly on a logarithmic scale")
    choices: tuple[Any, ...] = Field((), description="the values, instead of low and high")

    @model_validator(mode="after")
    def _range_or_choices(self) -> Self:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("a range of a search needs either low and high, or choices")
        if self.choices:
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be positive on a logarithmic scale, got {self.low}")
        return self


class TuneConfig(Section):
    """How the settings of the student and of its training are searched for."""

    model_config = ConfigDict(allow_inf_nan=False)

    trials: int = Field(30, ge=1, le=100_000, description="trainings, those that were cut short included")
    metric: Literal["nll", "accuracy"] = Field("nll", description="what is sought, on the validation set")
    startup: int = Field(8, ge=1, description="trials at random before the search learns from them")
    cut: bool = Field(True, description="end a trial that is worse than the median of the others at the same epoch")
    patience: int = Field(3, ge=0, description="epochs that a trial has before it can be cut")
    space: dict[str, SearchRange] = Field(
        {}, description="setting of [student] or [training] -> its range; without it, learning rate and the like"
    )


class ParetoConfig(Section):
    """Which students are made for the front of quality against footprint."""

    model_config = ConfigDict(allow_inf_nan=False)

    widths: tuple[float, ...] = Field((0.25, 0.5, 1.0), description="multiples of student.width to try", min_length=1)
    strategies: tuple[Strategy, ...] = Field(
        ("shrink-and-improve", "grow-improve-and-shrink"),
        description="shrink the network and improve it, or grow it, improve it and shrink it",
        min_length=1,
    )
    compressions: tuple[Compression, ...] = Field(
        ("int8", "int8-weights"), description="compressed forms of every improved student, beside float32"
    )
    grow: float = Field(2.0, gt=1, le=16, description="grow-improve-and-shrink: how much wider the network is grown")
    recovery: float = Field(0.3, gt=0, le=1, description="share of training.epochs that a pruned network trains for")
    cost: Literal["size_bytes", "latency_ms_batch1", "latency_ms_batch64"] = Field(
        "size_bytes", description="the footprint that quality is set against"
    )

    @model_validator(mode="after")
    def _distinct_positive_widths(self) -> Self:
        if min(self.widths) <= 0 or len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths must be different positive numbers, got {list(self.widths)}")
        return self


def default_space(student: StudentConfig) -> dict[str, SearchRange]:
    """Give the ranges that suit most students.

    Args:
      student: the student's configuration.

    Returns:
      Ranges of the learning rate, weight decay and batch size, and of the dropout where the network has any; of a text
      student's hidden layers, and where it hashes n-grams of which and into how many buckets.
    """
    space = {
        "training.lr": SearchRange(low=3e-4, high=3e-2, log=True),
        "training.weight_decay": SearchRange(low=1e-4, high=1e-1, log=True),
        "training.batch_size": SearchRange(choices=(32, 64, 128)),
    }
    if student.kind in ("mlp", "cnn", "text", "transformer"):
        space["student.dropout"] = SearchRange(low=0.0, high=0.5)
    if student.kind == "text":
        space["student.hidden"] = SearchRange(choices=([], [64]))
        space["training.lr"] = SearchRange(low=1e-3, high=1e-1, log=True)  # of embeddings
        if student.input.kind == "text" and student.input.tokenizer is None:
            space["student.input.analyzer"] = SearchRange(choices=("word", "char_wb"))
            space["student.input.ngrams"] = SearchRange(choices=([1, 1], [1, 2], [1, 4], [2, 5]))
            space["student.input.buckets"] = SearchRange(choices=(2**12, 2**15, 2**17))
    return space


def nested(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Turn dotted settings into sections: `{"training.lr": 0.1}` into `{"training": {"lr": 0.1}}`."""
    sections: dict[str, Any] = {}
    for name, value in settings.items():
        *path, key = name.split(".")
        section = sections
        for part in path:
            section = section.setdefault(part, {})
        section[key] = value
    return sections
