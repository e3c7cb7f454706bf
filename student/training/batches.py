"""The batches of a training: soft labels that suit the student, labelled examples, and how rows are dealt out to steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.inputs.config import padding_id
from distilbeam.student.data.batch_rng import Place
from distilbeam.student.data.columns import INPUTS
from distilbeam.student.data.labelled import Examples, integers_meant, read_examples
from distilbeam.student.data.loader import Batch, SoftLabelDataset, Transform
from distilbeam.student.data.sampler import step_starts
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.augment import augment_images, drop_words
from distilbeam.student.training.config import DIVERGENCES, AugmentConfig, TrainConfig, check_kind
from distilbeam.student.training.distributed import Processes

NEEDED_COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("distill", *DIVERGENCES), ()),
    "weighted": ("weight",),
    "slam": ("alpha", "candidates"),
    "slam+weighted": ("alpha", "candidates", "weight"),
}
EXTREME = 1e6  # an input beyond it explains a loss that is no number better than the learning rate does
TEXTS = ("text", "tokens")  # kinds of inputs that have words to drop
SOFT, HARD = 0, 1  # numbers of the sources, for the augmentation


@dataclass(frozen=True)
class StepRows:
    """The rows of one step that this process computes.

    Attributes:
      soft: soft-labelled rows with their `inputs`, or None.
      hard: human-labelled rows, or None.
      count: rows of the step in all processes.
      processes: how many they are.
    """

    soft: Batch | None
    hard: Examples | None
    count: int
    processes: int

    def inputs(self) -> Tensor:
        """Join the inputs, the soft-labelled first."""
        parts = ([] if self.soft is None else [self.soft[INPUTS]]) + ([] if self.hard is None else [self.hard.inputs])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unusable(self, sources: Sources) -> str | None:
        """Say which row cannot be learned from: one with a label that is no number, or with an input that is none or huge."""
        for batch in () if self.soft is None else (self.soft,):
            labels, inputs = batch["teacher_logprobs"], batch[INPUTS]
            bad = labels.isnan().flatten(1).any(1)
            if bad.any() and sources.soft is not None:
                return f"{sources.soft.place_of(int(batch['row'][bad][0]))} has labels that are no numbers"
            if (found := _extreme(inputs)) is not None and sources.soft is not None:
                return f"{sources.soft.place_of(int(batch['row'][found]))} has {_largest(inputs, found)} in its input"
        if self.hard is not None and (found := _extreme(self.hard.inputs)) is not None:
            return f"a labelled example has {_largest(self.hard.inputs, found)} in its input"
        return None

    def __len__(self) -> int:
        return (0 if self.soft is None else len(self.soft["inputs"])) + (0 if self.hard is None else len(self.hard))


@dataclass(frozen=True)
class Sources:
    """The data of a training.

    Attributes:
      soft: soft-labelled rows, or None.
      hard: human-labelled rows, or None.
      held_out: the validation set, or None.
      steps: steps of an epoch, which visits every row once.
      input_shape: shape of one example's input.
      training: the training's configuration.
      seed: the one that the order of the rows is drawn with.
      processes: who shares the rows.
      padding: id of the padding of inputs that are ids, where words are dropped.
    """

    soft: SoftLabelDataset | None
    hard: Examples | None
    held_out: Examples | None
    steps: int
    input_shape: tuple[int, ...]
    training: TrainConfig
    seed: int
    processes: Processes
    padding: int | None = None

    def epoch(self, epoch: int, first: int) -> Iterator[StepRows]:
        """Give the steps of an epoch.

        Args:
          epoch: its number.
          first: the step to begin with; the soft labels must stand there already.
        """
        soft = None if self.soft is None else iter(self.soft)
        hard_rows = deal_out(self.hard, self.steps, self.seed, epoch)
        for step in range(first, self.steps):
            batch = None if soft is None else next(soft)
            hard = None if self.hard is None else self._hard(self.hard, _part(hard_rows[step], self.processes), epoch)
            mine = StepRows(batch, hard, 0, self.processes.size)
            yield replace(mine, count=round(self.processes.sum(len(mine))))

    def _hard(self, hard: Examples, rows: Tensor, epoch: int) -> Examples:
        inputs = augmented(hard.inputs[rows], rows, self.training.augment, self.padding, self.seed, epoch, HARD)
        return Examples(inputs, hard.classes[rows])


def open_sources(
    student: StudentConfig,
    training: TrainConfig,
    *,
    classes: Sequence[str],
    labelled: pa.Table | None,
    label_column: str,
    soft_labels: Sequence[str | Path],
    validation: pa.Table | None,
    seed: int,
    processes: Processes,
    mixing_weights: Sequence[float] | None = None,
    pseudo_labels: Sequence[str | Path] = (),
) -> Sources:
    """Read and check what a training is given; see `train` for the arguments.

    Raises:
      ValueError: there is nothing to train on, the labels do not suit the classes or the objective, or the inputs of
        the sources have different shapes.
    """
    read = partial(
        read_examples,
        label_column=label_column,
        classes=classes,
        config=student.input,
        integers=integers_meant([labelled, validation], label_column, classes),
    )
    hard = None if labelled is None else read(labelled)
    held_out = None if validation is None else read(validation, name="the validation examples")
    soft = open_soft_labels(
        soft_labels, student, training, classes, hard, seed, processes, mixing_weights, pseudo_labels
    )
    shape = shape_of_inputs(hard, held_out, soft)
    steps, padding = steps_per_epoch(training, hard, soft), _padding(student, training.augment)
    return Sources(soft, hard, held_out, steps, shape, training, seed, processes, padding)


def open_soft_labels(
    paths: Sequence[str | Path],
    student: StudentConfig,
    training: TrainConfig,
    classes: Sequence[str],
    hard: Examples | None,
    seed: int,
    processes: Processes,
    mixing_weights: Sequence[float] | None = None,
    pseudo_labels: Sequence[str | Path] = (),
) -> SoftLabelDataset | None:
    """Open soft labels for a training; their share of a batch is their share of all rows.

    Args:
      paths: directories of datasets.
      student: the student's configuration.
      training: its training's configuration.
      classes: names of the student's classes.
      hard: the human-labelled rows, or None.
      seed: the one that the order of the rows is drawn with.
      processes: who shares the rows.
      mixing_weights: share of each dataset in an epoch; None for their numbers of rows.
      pseudo_labels: directories of datasets of students' own labels.

    Returns:
      The dataset, or None when there are no soft labels.

    Raises:
      ValueError: there is nothing to train on, or the labels do not suit the classes or the objective.
    """
    if not paths and not pseudo_labels:
        if hard is None:
            raise ValueError("training needs labelled examples or soft labels, got neither")
        return None
    columns = NEEDED_COLUMNS[training.objective]
    augment = training.augment

    def soft_rows_of_a_step(rows: int) -> int:
        share = rows / (rows + (0 if hard is None else len(hard)))
        return max(1, round(training.batch_size * share / processes.size))

    dataset = SoftLabelDataset(
        paths,
        soft_rows_of_a_step,
        seed,
        processes.rank,
        processes.size,
        input=student.input,
        pseudo=pseudo_labels,
        columns=columns,
        mixing_weights=mixing_weights,
        transform=_transform(student, augment),
        workers=training.loader_workers,
        pin_memory=processes.device.type == "cuda",
    )
    check_kind(training.objective, dataset.spec.kind)
    _require_classes(dataset, classes)
    ranges = {"weight": (0.0, math.inf), "alpha": (0.0, 1.0), "candidates": (1.0, float(len(classes)))}
    estimated = {"weight"} if training.reestimate_epochs is not None else set()
    if missing := [name for name in columns if name not in dataset.scalar_columns and name not in estimated]:
        raise ValueError(
            f"objective {training.objective!r} needs the columns {' and '.join(missing)} beside the soft labels; label "
            "with a validation set, which they are estimated from, or choose objective 'distill'"
        )
    for name in columns:
        if name in dataset.scalar_columns:
            dataset.require_values(name, *ranges[name])
    if "weight" in columns and "weight" in dataset.scalar_columns and not dataset.mean("weight"):
        raise ValueError(
            f"the soft labels' column weight must be above 0 in some row, it is 0 in all {dataset.rows:,}; weigh the rows, or "
            "choose training.objective = 'distill', which does not read it"
        )
    return dataset


def steps_per_epoch(training: TrainConfig, hard: Examples | None, soft: SoftLabelDataset | None) -> int:
    """Count the steps in which every row is visited once."""
    if soft is not None:
        return len(soft)
    assert hard is not None
    return math.ceil(len(hard) / training.batch_size)


def fewest_rows(sources: Sources) -> int:
    """Count the rows of the smallest step of an epoch in the process that has fewest of them, where it has any."""
    hard = sources.hard
    hard_sizes = [len(rows) for rows in deal_out(hard, sources.steps, sources.seed, 0)] or [0] * sources.steps
    soft_sizes = [0] * sources.steps
    if sources.soft is not None:
        starts = step_starts(0, sources.soft.rows, sources.soft.batch_size * sources.processes.size)
        soft_sizes = np.diff(np.append(starts, sources.soft.rows)).tolist()
    size = sources.processes.size
    return min(
        rows
        for soft, hard_rows in zip(soft_sizes, hard_sizes, strict=True)
        for rows in (sum(n * (rank + 1) // size - n * rank // size for n in (soft, hard_rows)) for rank in range(size))
        if rows
    )


def deal_out(hard: Examples | None, steps: int, seed: int, epoch: int) -> list[Tensor]:
    """Deal the human-labelled rows out over an epoch's steps."""
    if hard is None:
        return []
    rows = np.random.default_rng([seed, epoch, len(hard)]).permutation(len(hard))
    return [torch.from_numpy(part) for part in np.array_split(rows, steps)]


def shape_of_inputs(hard: Examples | None, held_out: Examples | None, soft: SoftLabelDataset | None) -> tuple[int, ...]:
    """Give the shape of one example's input, which all sources must agree on."""
    examples = {"labelled": hard, "validation": held_out}
    shapes = {name: tuple(some.inputs.shape[1:]) for name, some in examples.items() if some is not None}
    if soft is not None:
        shapes["soft-labelled"] = soft.input_shape
    if len(set(shapes.values())) > 1:
        described = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"inputs of all examples must have one shape, got {described}")
    return next(iter(shapes.values()))


def _extreme(inputs: Tensor) -> int | None:
    """Find the first row with a number that is none or beyond `EXTREME`."""
    if not inputs.is_floating_point() or not inputs.numel():
        return None
    bad = ~(inputs.flatten(1).abs() <= EXTREME).all(1)
    return int(bad.int().argmax()) if bad.any() else None


def _largest(inputs: Tensor, row: int) -> str:
    return f"{float(inputs[row].abs().max()):.3g}"


def augmented(
    inputs: Tensor, positions: Tensor, config: AugmentConfig, padding: int | None, seed: int, epoch: int, source: int
) -> Tensor:
    """Change inputs at random, as `augment_images` and `drop_words` do; see there."""
    images = augment_images(inputs, positions, config, seed, epoch, source)
    return drop_words(images, positions, config, seed, epoch, source, padding)


def _transform(student: StudentConfig, config: AugmentConfig) -> Transform | None:
    if not (config.flip or config.crop or config.word_dropout):
        return None
    return partial(_augmented, config, _padding(student, config))


def _augmented(config: AugmentConfig, padding: int | None, batch: Batch, place: Place) -> Batch:
    positions = place.position + torch.arange(len(batch[INPUTS]))
    changed = augmented(batch[INPUTS], positions, config, padding, place.seed, place.epoch, SOFT)
    return {**batch, INPUTS: changed}


def _padding(student: StudentConfig, config: AugmentConfig) -> int | None:
    """Give the id that takes a dropped word's place.

    Raises:
      ValueError: words are to be dropped of inputs that are no texts.
    """
    if not config.word_dropout:
        return None
    if student.input.kind not in TEXTS:
        raise ValueError(
            f"augment.word_dropout needs texts or tokens, got an input of kind {student.input.kind!r}; set it to 0"
        )
    return padding_id(student.input) if student.input.gives_ids else None


def _require_classes(dataset: SoftLabelDataset, classes: Sequence[str]) -> None:
    spec = dataset.spec
    if spec.num_classes != len(classes):
        raise ValueError(f"the soft labels must have the student's {len(classes)} classes, got {spec.num_classes}")
    if spec.classes is not None and tuple(spec.classes) != tuple(classes):
        index = next(i for i, pair in enumerate(zip(spec.classes, classes, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"the soft labels must have the student's classes in their order, class {index} is {spec.classes[index]!r} "
            f"there and {classes[index]!r} here"
        )


def _part(rows: Tensor, processes: Processes) -> Tensor:
    """Take a process's part of a step's rows, as the soft labels are shared out."""
    start, stop = (len(rows) * (processes.rank + more) // processes.size for more in (0, 1))
    return rows[start:stop]
