"""The optional extras that a run, a labelling job, an ingest or a command about students needs, by its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from distilbeam.extras import Need

if TYPE_CHECKING:
    from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig
    from distilbeam.student.search.space import ParetoConfig

STORES = {"s3": "s3", "s3a": "s3", "gs": "gcp", "gcs": "gcp"}
TEACHERS = {
    "causal_lm": ("hf", ("transformers", "tokenizers")),
    "huggingface": ("hf", ("transformers",)),
    "onnx": ("onnx", ("onnxruntime",)),
    "openai": ("hf", ("transformers", "tokenizers")),
}
ONNX_FORMATS = ("onnx", "int8", "int8-weights")


def needs_of(config: RunConfig | TokenRunConfig | LabelConfig) -> Iterator[Need]:
    """List what a configuration needs.

    Args:
      config: of a run or a labelling job.

    Yields:
      What the teacher, the inputs, the training and the places of files need.
    """
    if config.teacher.kind in TEACHERS:
        extra, modules = TEACHERS[config.teacher.kind]
        yield Need(f"teacher.kind = '{config.teacher.kind}'", extra, modules)
    if getattr(config.teacher, "tokenizer", None) and config.teacher.kind not in TEACHERS:
        yield Need("teacher.tokenizer", "hf", ("transformers", "tokenizers"))
    inputs = {"teacher": config.teacher.input, "student": getattr(getattr(config, "student", None), "input", None)}
    for section, reading in inputs.items():
        if reading is not None and reading.tokenizer:
            yield Need(f"{section}.input.tokenizer", "hf", ("tokenizers",))
    if getattr(getattr(config, "student", None), "kind", None) == "huggingface":
        yield Need("student.kind = 'huggingface'", "hf", ("transformers",))
    if getattr(getattr(config, "student", None), "kind", None) == "causal_lm":
        yield Need("student.kind = 'causal_lm'", "hf", ("transformers", "tokenizers"))
    encoder = getattr(getattr(config, "student", None), "encoder", None)
    if encoder is not None and encoder.folder:
        yield Need("student.encoder.folder", "hf", ("transformers",))
    if getattr(getattr(config, "training", None), "tensorboard", False):
        yield Need("training.tensorboard", "tensorboard", way_round="leave it out")
    if (tracker := getattr(getattr(config, "training", None), "track", None)) is not None:
        yield Need(f"training.track = '{tracker}'", tracker, way_round="leave it out")
    for name, place in (("data.pool", config.data.pool), ("run.directory", config.run.directory)):
        store = STORES.get(place.partition("://")[0]) if "://" in place else None
        if store is not None:
            yield Need(f"{name} = '{place}'", store)


def needs_of_formats(formats: Sequence[str], pruned: str) -> Iterator[Need]:
    """List what formats of exports need.

    Args:
      formats: names of formats.
      pruned: the name of the one that prunes.

    Yields:
      What each needs.
    """
    onnx = [name for name in formats if name in ONNX_FORMATS]
    if onnx:
        yield Need(f"--format {' '.join(onnx)}", "onnx", way_round="name --format pt2 alone")
    if pruned in formats:
        yield Need(f"--format {pruned}", "compress")


def needs_of_sweep(config: ParetoConfig) -> Iterator[Need]:
    """List what a sweep needs for the strategies and compressions that it is to make."""
    if "grow-improve-and-shrink" in config.strategies:
        yield Need("pareto.strategies", "compress", way_round="set pareto.strategies = ['shrink-and-improve']")
    if config.compressions:
        yield Need("pareto.compressions", "onnx", way_round="set pareto.compressions = []")


def needs_of_search() -> Iterator[Need]:
    """List what a search for settings needs."""
    yield Need("distilbeam tune", "tune")


def needs_of_ingest(format_: str, out: str) -> Iterator[Need]:
    """List what it takes to read a format and to write where the pool goes."""
    if format_ in ("lm", "chat"):
        yield Need(f"--format {format_}", "hf", ("transformers", "tokenizers"))
    if format_ == "tfrecord":
        yield Need("--format tfrecord", "tfrecord")
    if (extra := STORES.get(out.partition("://")[0])) and "://" in out:
        yield Need(f"--out {out}", extra)
