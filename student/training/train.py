"""Train a student from human labels and stored soft labels: one loop.

    result = train(StudentConfig(...), TrainConfig(epochs=60), classes=..., soft_labels=["run/labels/round=000"], ...)
    torchrun --nproc-per-node 2 -m distilbeam launch training.toml      # several processes, one student

Every step mixes soft-labelled and human-labelled rows in the proportion of the whole, so that an epoch visits each row
once; `loss.py` has the loss, `batches.py` what is read, `optimizer.py` the learning rate. The epoch with the least
negative log-likelihood on the validation set is kept. For one seed, one machine and one number of threads the weights
are the same bit by bit, also when the training was killed and went on from a checkpoint (`checkpoints.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from distilbeam.extras import Need, require_extras
from distilbeam.progress import Progress
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.data.class_labels import INTEGERS
from distilbeam.student.data.labelled import Examples, integers_meant
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.networks.bag import start_from_table
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import HUGGINGFACE, StudentConfig
from distilbeam.student.networks.encoder_table import read_table
from distilbeam.student.own_files import content_of_file
from distilbeam.student.training.augment import Mixture
from distilbeam.student.training.batches import Sources, open_sources
from distilbeam.student.training.checkpoints import TrainingDirectory
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import end_step, joined_processes
from distilbeam.student.training.fingerprint import identity
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.metrics_log import Observer
from distilbeam.student.training.optimizer import make_optimizer, moving_average, set_lr
from distilbeam.student.training.rng import own_generators
from distilbeam.student.training.sample_weights import Reestimation, RowWeights, forward
from distilbeam.student.training.single_rows import require_room_for_norms
from distilbeam.student.training.state import TrainingState
from distilbeam.student.training.taken import TakenStep, TakenSteps
from distilbeam.student.training.threads import threads_of_steps
from distilbeam.student.training.wrap import last_layer_together, make_network, precisions
from distilbeam.student.trust import trust_config

EVALUATION_ROWS = 1024


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
      metrics: `epochs`, `best_epoch`, `steps`, `train_loss` of the best epoch, `soft_rows`, `hard_rows`, `seconds`, and
        `validation_...` of the best epoch where there is a validation set.
      directory: the student's.
    """

    metrics: dict[str, float]
    directory: Path


def train(
    student: StudentConfig,
    training: TrainConfig,
    *,
    classes: Sequence[str],
    labelled: pa.Table | None,
    label_column: str,
    soft_labels: Sequence[str | Path],
    validation: pa.Table | None,
    directory: str | Path,
    seed: int,
    init: str | Path | None = None,
    embedding: str | Path | None = None,
    validation_teacher: npt.NDArray[np.float32] | None = None,
    mixing_weights: Sequence[float] | None = None,
    pseudo_labels: Sequence[str | Path] = (),
    last_epoch: int | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a student and write it; a training that was killed goes on where its last checkpoint is.

    Args:
      student: what to train.
      training: how.
      classes: names of the classes in the order of the logits.
      labelled: human-labelled examples, or None.
      label_column: column of `labelled` and `validation` with the true class, as a name or an index; see `class_labels`.
      soft_labels: directories of soft-label datasets that mean the same; may be empty when there are labelled examples.
      validation: labelled examples that choose the epoch; without them the last epoch is kept.
      directory: where the student appears, by one rename at the end; it must not hold anything. Until then the training
        keeps its checkpoints and figures in the directory of this name with `.training` after it.
      seed: decides the initial weights, the order of the rows, the augmentation and the dropout.
      init: directory of a student to start from instead of random weights.
      embedding: file with a table that a text student's embeddings start from; see `encoder_table.write_table`.
      validation_teacher: the teacher's log-probabilities for `validation`, float32 [rows, C], NaN in rows that it did
        not answer; needed for `reestimate_epochs`.
      mixing_weights: share of each soft-label dataset in an epoch, up to a common factor; None for their numbers of
        rows.
      pseudo_labels: directories of datasets of students' own soft labels, in the form of `soft_labels` and learned like them.
      last_epoch: epoch after which training stops, on the learning rate's way through all of `training.epochs`: where
        another training has found it and no rows are left to find it on.
      progress: told every step, with its loss, and every epoch, with its figures.

    Returns:
      The metrics and the directory.

    Raises:
      ValueError: there is nothing to train on, the soft labels do not suit the classes or the objective, the loss stops
        being a number, the device is not there, or a stopped training of other settings is in the way.
      FileExistsError: the directory already holds something.
    """
    directory = Path(directory)
    require_extras(_needs(student, training))
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds a student; choose another directory or remove it")
    if len(set(classes)) < len(classes) or len(classes) < 2:
        raise ValueError(f"classes must be at least two different names, got {', '.join(classes) or 'none'}")
    if training.finetune is not None:
        raise ValueError(
            "finetune is the second phase of blind distillation, which train_blind does; leave it out here"
        )

    trust_config(student)
    with joined_processes(training.device) as processes, own_generators(seed, processes.device):
        device = processes.device
        sources = open_sources(
            student,
            training,
            classes=classes,
            labelled=labelled,
            label_column=label_column,
            soft_labels=soft_labels,
            validation=validation,
            seed=seed,
            processes=processes,
            mixing_weights=mixing_weights,
            pseudo_labels=pseudo_labels,
        )
        steps, total = sources.steps, training.epochs * sources.steps
        reestimation = _reestimation(student, training, sources, soft_labels, validation_teacher)
        spec = None if sources.soft is None else sources.soft.spec

        module = build_student(student, sources.input_shape, len(classes))
        require_room_for_norms(module, sources, student)
        if init is not None:
            _start_from(module, init, student)
        elif embedding is not None:
            start_from_table(module, read_table(embedding))
        module.to(device)
        network = make_network(module, student, training, processes, spec)
        parameters = list(module.parameters())
        optimizer = make_optimizer(module, training)
        average = moving_average(module, training.ema)
        weights = RowWeights(sources.soft if "weighted" in training.objective else None)
        if processes.rank > 0:
            torch.manual_seed(seed + processes.rank)  # the weights are alike, the dropout is not

        state = TrainingState(module, optimizer, average, sources.soft, weights)
        about = identity(student, training, classes, sources, init, validation_teacher)
        about |= {} if last_epoch is None else {"last_epoch": last_epoch}
        about |= {} if embedding is None else {"embedding": content_of_file(embedding)}
        epochs = min(training.epochs, last_epoch or training.epochs)
        with (
            threads_of_steps(module, sources, student),
            TrainingDirectory(directory, training, about, processes) as work,
        ):
            work.resume(state)
            silent, progress = not processes.first, progress or Progress()
            for figures in state.history:  # of the training that goes on
                progress.epoch(int(figures["epoch"]), figures)
            with Observer(work.path, training, total, state.done, state.seconds, progress, silent) as observer:

                def look(taken: TakenStep, value: float, norm: float | None) -> None:
                    if not math.isfinite(value + (norm or 0.0)):
                        raise ValueError(_not_finite(value, norm or 0.0, taken, total, training, work, sources))
                    state.loss_sum += value
                    observer.step(taken.number + 1, value, taken.lr, norm, taken.rows.count)

                taken_steps = TakenSteps(device, look)
                for epoch in range(state.done // steps, epochs):
                    first = state.done % steps
                    if reestimation is not None and first == 0 and reestimation.due(epoch):
                        weights.estimated = reestimation.weights(state.shown, device, processes)
                    module.train()
                    for step, rows in enumerate(sources.epoch(epoch, first), first):
                        lr = set_lr(optimizer, training, state.done, total)
                        mixture = Mixture.draw(len(rows), training.augment, seed, state.done, processes.rank)
                        loss = step_loss(network, training, rows, spec, weights.of(rows.soft), mixture, device)
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        norm = None
                        if training.clip is not None:
                            norm = nn.utils.clip_grad_norm_(parameters, training.clip)
                        optimizer.step()
                        if average is not None:
                            average.update_parameters(module)
                        end_step(device)

                        taken_steps.add(TakenStep(state.done, loss.detach(), norm, rows, lr))
                        state.done += 1
                        if step + 1 < steps and work.due(state.done):
                            taken_steps.finish()
                            state.seconds = observer.seconds
                            work.save(state)

                    taken_steps.finish()
                    processes.align(module, state.shown)
                    figures = {"epoch": epoch + 1, "train_loss": processes.sum(state.loss_sum) / processes.size / steps}
                    measured = _validate(state.shown, sources.held_out, device, training.lr) if processes.first else {}
                    figures |= processes.from_first(measured)
                    state.end_epoch(figures)
                    observer.epoch(state.done, figures)
                    if training.patience is not None and epoch + 1 - state.best_epoch >= training.patience:
                        break
                    if work.due(state.done):
                        state.seconds = observer.seconds
                        work.save(state)

            chosen = state.history[state.best_epoch - 1]
            metrics = {
                "epochs": len(state.history),
                "best_epoch": chosen["epoch"],
                "steps": len(state.history) * steps,
                "soft_rows": 0 if sources.soft is None else sources.soft.rows,
                "hard_rows": 0 if sources.hard is None else len(sources.hard),
                **{name: value for name, value in chosen.items() if name != "epoch"},
            }
            if processes.first:
                module.load_state_dict(state.best)
                ran = precisions(module, training, together=last_layer_together(module, training, processes, spec))
                extra = {
                    "training": training.model_dump(mode="json"),
                    "seed": seed,
                    "metrics": metrics,
                    "precision": ran,
                }
                extra[INTEGERS] = integers_meant([labelled, validation], label_column, classes)
                save_student(directory, module, student, classes, sources.input_shape, extra, work.hand_over)
                work.remove()
            processes.wait()
    return TrainResult(metrics | {"seconds": observer.seconds}, directory)


def _needs(student: StudentConfig, training: TrainConfig) -> Iterator[Need]:
    if student.input.tokenizer:
        yield Need("student.input.tokenizer", "hf", ("tokenizers",))
    if student.kind == HUGGINGFACE:
        yield Need(f"student.kind = '{HUGGINGFACE}'", "hf", ("transformers",))
    if training.tensorboard:
        yield Need("training.tensorboard", "tensorboard", way_round="leave it out")
    if training.track is not None:
        yield Need(f"training.track = '{training.track}'", training.track, way_round="leave it out")


def _validate(module: nn.Module, held_out: Examples | None, device: torch.device, lr: float) -> dict[str, float]:
    if held_out is None:
        return {}
    logits = forward(module, held_out.inputs.split(EVALUATION_ROWS), device)
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all() and finite.any():
        row = int(finite.argmin())
        raise ValueError(
            f"row {row:,} of the validation examples cannot be answered: the largest number of its input is "
            f"{float(held_out.inputs[row].abs().max()):.3g}; correct it or leave it out"
        )
    if not finite.all():
        raise ValueError(f"the student's logits stopped being numbers; lower training.lr ({lr})")
    measured = evaluate(logits, held_out.classes.numpy())
    return {f"validation_{name}": measured[name] for name in ("nll", "accuracy", "ece")}


def _not_finite(
    loss: float,
    norm: float,
    taken: TakenStep,
    total: int,
    training: TrainConfig,
    work: TrainingDirectory,
    sources: Sources,
) -> str:
    what = f"training loss became {loss}" if not math.isfinite(loss) else f"norm of the gradient became {norm}"
    bad = taken.rows.unusable(sources)
    way_out = f"{bad}; correct it or leave it out" if bad else f"lower training.lr ({training.lr})"
    return f"the {what} in step {taken.number + 1} of {total}; {way_out}. The step's rows are in {work.keep_batch(taken.rows)}"


def _start_from(module: nn.Module, init: str | Path, config: StudentConfig) -> None:
    earlier = load_student(init)
    try:
        module.load_state_dict(earlier.module.state_dict())
    except RuntimeError as e:
        raise ValueError(
            f"init must be a student of the same network, {init} is a {earlier.config.kind}, not this {config.kind}"
        ) from e


def _reestimation(
    student: StudentConfig,
    training: TrainConfig,
    sources: Sources,
    soft_labels: Sequence[str | Path],
    teacher: npt.NDArray[np.float32] | None,
) -> Reestimation | None:
    if training.reestimate_epochs is None or sources.soft is None:
        return None
    if sources.held_out is None or teacher is None:
        raise ValueError(
            "reestimate_epochs needs a validation set and the teacher's log-probabilities for it, which the weights are "
            "estimated from; give both or leave it out"
        )
    processes = sources.processes
    in_any_order = SoftLabelDataset(
        soft_labels, EVALUATION_ROWS, sources.seed, processes.rank, processes.size, input=student.input, columns=()
    )
    return Reestimation(in_any_order, sources.held_out, teacher, training.reestimate_epochs)
