"""Train a student from human labels and stored soft labels: one loop.

Every step mixes soft-labelled and human-labelled rows in the proportion of the whole, so that an epoch visits each row
once; `step_loss.py` has the loss, `sources.py` what is read. The epoch with the least negative log-likelihood on the
validation set is kept. For one seed, one machine and one number of threads the weights are the same bit by bit.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.config import StudentConfig
from distilbeam.student.evaluate import evaluate
from distilbeam.student.labelled import Examples, read_examples
from distilbeam.student.laurel import without_decay
from distilbeam.student.models import build_student
from distilbeam.student.sources import deal_out, open_soft_labels, shape_of_inputs, steps_per_epoch
from distilbeam.student.step_loss import step_loss
from distilbeam.student.train_config import TrainConfig

Progress = Callable[[int, int, float], None]
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
    progress: Progress | None = None,
) -> TrainResult:
    """Train a student and write it.

    Args:
      student: what to train.
      training: how.
      classes: names of the classes in the order of the logits.
      labelled: human-labelled examples, or None.
      label_column: column of `labelled` and `validation` with the true class, as a name or an index.
      soft_labels: directories of soft-label datasets that mean the same; may be empty when there are labelled examples.
      validation: labelled examples that choose the epoch; without them the last epoch is kept.
      directory: where the student appears, by one rename at the end; it must not hold anything.
      seed: of the initial weights, the order and the dropout.
      init: directory of a student to start from instead of random weights.
      progress: called after every step with the steps done, the steps in all, and the step's loss.

    Returns:
      The metrics and the directory.

    Raises:
      ValueError: there is nothing to train on, the soft labels do not suit the classes or the objective, or the loss
        stops being a number.
      FileExistsError: the directory already holds something.
    """
    began = time.perf_counter()
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds a student; choose another directory or remove it")
    device = _device(training.device)
    hard = None if labelled is None else read_examples(labelled, label_column, classes, student.input)
    held_out = None if validation is None else read_examples(validation, label_column, classes, student.input)
    soft = open_soft_labels(soft_labels, student, training, classes, hard, seed)
    steps = steps_per_epoch(training, hard, soft)
    total = training.epochs * steps
    input_shape = shape_of_inputs(hard, held_out, soft)
    spec = None if soft is None else soft.spec
    weight_scale = 1.0 / soft.mean("weight") if soft is not None and "weighted" in training.objective else 1.0

    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(seed)
        module = build_student(student, input_shape, len(classes))
        if init is not None:
            _start_from(module, init, student)
        module.to(device)
        optimizer = _optimizer(module, training)
        history: list[dict[str, float]] = []
        best: dict[str, Tensor] = {}

        for epoch in range(training.epochs):
            module.train()
            losses = 0.0
            soft_batches = iter(soft) if soft is not None else None
            hard_rows = deal_out(hard, steps, seed, epoch)
            for step in range(steps):
                done = epoch * steps + step
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * _lr_factor(done, total, training)
                soft_batch = None if soft_batches is None else next(soft_batches)
                hard_batch = (
                    None if hard is None else Examples(hard.inputs[hard_rows[step]], hard.classes[hard_rows[step]])
                )
                loss = step_loss(module, training, soft_batch, hard_batch, spec, weight_scale, device)
                value = float(loss.detach())
                _require_finite(value, done, total, training)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if training.clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), training.clip)
                optimizer.step()
                losses += value
                if progress is not None:
                    progress(done + 1, total, value)

            history.append(
                {"epoch": epoch + 1, "train_loss": losses / steps} | _validate(module, held_out, device, training.lr)
            )
            if _is_best(history):
                best = copy.deepcopy(module.state_dict())
            elif training.patience is not None and epoch + 1 - _best_epoch(history) >= training.patience:
                break

        module.load_state_dict(best)

    chosen = history[_best_epoch(history) - 1]
    metrics = {
        "epochs": len(history),
        "best_epoch": chosen["epoch"],
        "steps": len(history) * steps,
        "soft_rows": 0 if soft is None else soft.rows,
        "hard_rows": 0 if hard is None else len(hard),
        **{name: value for name, value in chosen.items() if name != "epoch"},
    }
    extra = {"training": training.model_dump(mode="json"), "seed": seed, "metrics": metrics}
    save_student(directory, module, student, classes, input_shape, extra, lambda path: _write_history(path, history))
    return TrainResult(metrics | {"seconds": time.perf_counter() - began}, directory)


def _optimizer(module: nn.Module, training: TrainConfig) -> torch.optim.Optimizer:
    exempt = without_decay(module)
    groups = [
        {"params": [p for p in module.parameters() if p not in exempt], "weight_decay": training.weight_decay},
        {"params": [p for p in module.parameters() if p in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9, nesterov=True)
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=training.lr, fused=fused)


def _lr_factor(done: int, total: int, training: TrainConfig) -> float:
    warm = math.ceil(training.warmup * total)
    if done < warm:
        return (done + 1) / warm
    if training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))


def _validate(module: nn.Module, held_out: Examples | None, device: torch.device, lr: float) -> dict[str, float]:
    if held_out is None:
        return {}
    module.eval()
    with torch.inference_mode():
        logits_BC = torch.cat(
            [module(part.to(device)).float().cpu() for part in held_out.inputs.split(EVALUATION_ROWS)]
        )
    if not bool(torch.isfinite(logits_BC).all()):
        raise ValueError(f"the student's logits stopped being numbers; lower training.lr ({lr})")
    measured = evaluate(logits_BC.numpy(), held_out.classes.numpy())
    return {f"validation_{name}": measured[name] for name in ("nll", "accuracy", "ece")}


def _require_finite(loss: float, done: int, total: int, training: TrainConfig) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the training loss became {loss} in step {done + 1} of {total}; lower training.lr ({training.lr}) or look "
            "for missing values in the inputs"
        )


def _best_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """Give the number of the epoch with the least validation loss, the first of equals; else the last."""
    if "validation_nll" not in history[-1]:
        return len(history)
    return 1 + min(range(len(history)), key=lambda epoch: history[epoch]["validation_nll"])


def _is_best(history: Sequence[Mapping[str, float]]) -> bool:
    return _best_epoch(history) == len(history)


def _start_from(module: nn.Module, init: str | Path, config: StudentConfig) -> None:
    earlier = load_student(init)
    try:
        module.load_state_dict(earlier.module.state_dict())
    except RuntimeError as e:
        raise ValueError(
            f"init must be a student of the same network, {init} is a {earlier.config.kind}, not this {config.kind}"
        ) from e


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None else accelerator


def _write_history(directory: Path, history: Sequence[Mapping[str, Any]]) -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(dict(epoch)) + "\n" for epoch in history))
