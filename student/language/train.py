"""Train a language model from stored token labels: one loop, in one process or several.

    train_language_model(LanguageModelConfig(...), TokenTrainConfig(), soft_labels=["job/labels"], directory="student", seed=0)
    torchrun --nproc-per-node 2 -m distilbeam launch training.toml

A step is `batch_size` blocks, shared out to the processes, each of which cuts its own into `accumulate` micro-batches. The order of the
blocks depends on neither, so that a training that was killed goes on with another number of processes; with the same number its
weights are the same bit by bit on a CPU. The last epoch's weights are kept, or their moving average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distilbeam.inputs.tokenizer import TokenizerFolder, load_tokenizer
from distilbeam.progress import Progress
from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.language.config import LanguageModelConfig, TokenTrainConfig
from distilbeam.student.language.evaluate import BLOCKS, measure, token_bytes
from distilbeam.student.language.folder import save_language_model
from distilbeam.student.language.network import CausalLm, build_language_model, require_suits
from distilbeam.student.language.sharing import gradients_shared, recompute_activations, share_out
from distilbeam.student.language.state import TokenState, WeightAverage, whole_weights
from distilbeam.student.language.step import Batch, TokenStep, micro_batches, objective
from distilbeam.student.language.threads import step_operations, threads_for
from distilbeam.student.own_files import content_of_folder
from distilbeam.student.training.checkpoints import TrainingDirectory
from distilbeam.student.training.config import FREE
from distilbeam.student.training.distributed import Processes, end_step, joined_processes
from distilbeam.student.training.metrics_log import Observer
from distilbeam.student.training.optimizer import make_optimizer, set_lr
from distilbeam.student.training.rng import own_generators
from distilbeam.student.training.train import TrainResult
from distilbeam.student.trust import trust
from distilbeam.teacher.softlabels import SoftLabelSpec


def train_language_model(
    student: LanguageModelConfig,
    training: TokenTrainConfig,
    *,
    soft_labels: Sequence[str | Path],
    directory: str | Path,
    seed: int,
    validation: str | Path | None = None,
    mixing_weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a student and write it; a training that was killed goes on where its last checkpoint is.

    Args:
      student: what to train.
      training: how.
      soft_labels: directories of token labels that mean the same.
      directory: where the student appears, by one rename at the end; until then `NAME.training` beside it has the checkpoints.
      seed: decides the initial weights, the order of the blocks and the dropout.
      validation: directory of token labels of other blocks, on which the student is measured after each epoch.
      mixing_weights: share of each dataset in an epoch; None for their numbers of blocks.
      progress: told every step, with its loss, and every epoch, with its figures.

    Returns:
      The metrics (`epochs`, `steps`, `tokens`, `tokens_per_s`, `train_loss`, `validation_...`) and the directory.

    Raises:
      ValueError: the labels are of examples, of another tokenizer, or more ids or tokens than the student has; blocks cannot
        be shared out; the loss stops being a number; or a stopped training of other settings is in the way.
      FileExistsError: the directory already holds something.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds a student; choose another directory or remove it")
    if student.factory is not None:
        trust(student.factory)
    with joined_processes(training.device) as processes, own_generators(seed, processes.device):
        blocks = _open(soft_labels, training, seed, processes, mixing_weights)
        held_out = None if validation is None else _validation(validation, blocks.spec)
        tokenizer = load_tokenizer(student.tokenizer or str(student.model), "student.tokenizer")
        tokenizer.require_same(blocks.spec.tokenizer, blocks.spec.num_classes, "the labels")
        network = build_language_model(student, tokenizer)
        require_suits(network, blocks.spec.num_classes, blocks.spec.sequence_length or 0)
        tokens = training.batch_size // processes.size * (blocks.spec.sequence_length or 0)
        operations = step_operations(network, blocks.spec.num_classes, tokens)
        with (
            threads_for(operations, processes.device),
            _Trained(student, training, network, blocks, tokenizer, held_out, directory, seed, processes) as work,
        ):
            return work.to_the_end(progress or Progress())


class _Trained:
    """A training with all that it needs; a context that holds its directory."""

    def __init__(
        self,
        student: LanguageModelConfig,
        training: TokenTrainConfig,
        network: CausalLm,
        blocks: TokenLabelDataset,
        tokenizer: TokenizerFolder,
        held_out: TokenLabelDataset | None,
        directory: Path,
        seed: int,
        processes: Processes,
    ) -> None:
        self.student, self.training, self.network, self.blocks = student, training, network, blocks
        self.tokenizer, self.held_out, self.directory, self.seed = tokenizer, held_out, directory, seed
        self.processes, self.spec = processes, blocks.spec
        if training.checkpointing:
            recompute_activations(network)
        step = TokenStep(network.to(processes.device), training, self.spec).train()
        self.step = share_out(step, training, processes)
        self.optimizer = make_optimizer(step, training)
        average = None if training.ema is None else WeightAverage(network, training.ema)
        if processes.rank > 0:
            torch.manual_seed(seed + processes.rank)  # the weights are alike, the dropout is not
        self.state = TokenState(network, self.optimizer, average, blocks)
        self.steps = len(blocks)
        self.total = training.epochs * self.steps
        self.work = TrainingDirectory(directory, training, self._identity(), processes)

    def __enter__(self) -> _Trained:
        self.work.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.work.__exit__()

    def to_the_end(self, progress: Progress) -> TrainResult:
        """Train the epochs that are left, and write the student."""
        state, training = self.state, self.training
        self.work.resume(state)
        for figures in state.history:  # of the training that goes on
            progress.epoch(int(figures["epoch"]), figures)
        silent = not self.processes.first
        with Observer(self.work.path, training, self.total, state.done, state.seconds, progress, silent) as observer:
            for epoch in range(state.done // self.steps, training.epochs):
                for step, batch in enumerate(self.blocks, state.done % self.steps):
                    loss, norm, lr = self._take(batch)
                    state.done += 1
                    state.loss_sum += loss
                    observer.step(state.done, loss, lr, norm, training.batch_size)
                    if step + 1 < self.steps and self.work.due(state.done):
                        state.seconds = observer.seconds
                        self.work.save(state)
                figures = {"epoch": epoch + 1, "train_loss": state.loss_sum / self.steps, **self._validate()}
                state.history.append(figures)
                state.loss_sum = 0.0
                observer.epoch(state.done, figures)
                if self.work.due(state.done):
                    state.seconds = observer.seconds
                    self.work.save(state)
        return self._write(observer.seconds)

    def _take(self, batch: Batch) -> tuple[float, float | None, float]:
        """Take a step; return its loss, the gradient's norm and the learning rate."""
        processes, training, state = self.processes, self.training, self.state
        labelled = int((batch["teacher_classes"][..., 0] >= 0).sum())
        count = round(processes.sum(labelled))
        lr = set_lr(self.optimizer, training, state.done, self.total)
        self.optimizer.zero_grad(set_to_none=True)
        parts = micro_batches(batch, training.accumulate, processes.device)
        own = 0.0
        for number, part in enumerate(parts):
            with gradients_shared(self.step, now=number + 1 == len(parts)):
                loss: Tensor = self.step(part, max(count, 1) / processes.size)
                loss.backward()
            # looked at in every step: a step of a language model takes longer than to wait for its end
            own += float(loss.detach())
        norm: float | None = None
        if training.clip is not None:
            norm = float(_plain(nn.utils.clip_grad_norm_(self.network.parameters(), training.clip)))
        value = processes.sum(own) / processes.size
        if not math.isfinite(value + (norm or 0.0)):
            rows = ", ".join(str(int(row)) for row in batch["row"][:3])
            raise ValueError(
                f"the training loss became {value} (norm of the gradient: {norm}) in step {state.done + 1} of {self.total}, over the "
                f"blocks {rows}, ...; lower training.lr ({training.lr})"
            )
        self.optimizer.step()
        if state.average is not None:
            state.average.update(self.network)
        end_step(processes.device)
        state.tokens += count
        return value, norm, lr

    def _validate(self) -> dict[str, float]:
        """Measure the student that would be kept, each process on the same blocks: with FSDP all must take part."""
        if self.held_out is None:
            return {}
        average = self.state.average
        if average is not None:
            average.swap(self.network)
        self.network.eval()
        lengths = token_bytes(self.tokenizer, self.spec.num_classes)
        self.held_out.load_state_dict({**self.held_out.state_dict(), "epoch": 0, "position": 0})
        network = self.network
        if self.training.shard == "fsdp" and self.processes.size > 1:
            network = self._whole_network()
        found = measure(network, self.held_out, self.held_out.spec, lengths, self.processes.device)
        self.network.train()
        if average is not None:
            average.swap(self.network)
        return {f"validation_{name}": value for name, value in found.items()}

    def _whole_network(self) -> CausalLm:
        """Build the student anew with the weights of all processes."""
        with torch.random.fork_rng(devices=[]):
            network = build_language_model(self.student, self.tokenizer)
        network.load_state_dict(whole_weights(self.network), strict=False)
        return network.to(self.processes.device).eval()

    def _write(self, seconds: float) -> TrainResult:
        state = self.state
        if state.average is not None:
            state.average.swap(self.network)
        metrics: dict[str, float] = {
            "epochs": len(state.history),
            "steps": state.done,
            "tokens": state.tokens,
            "tokens_per_s": round(state.tokens / max(seconds, 1e-9), 1),
            **{name: value for name, value in state.history[-1].items() if name != "epoch"},
        }
        sharded = self.training.shard == "fsdp" and self.processes.size > 1
        weights = whole_weights(self.network)
        if self.processes.first:
            network = self._fresh() if sharded else self.network.cpu()
            extra = {"training": self.training.model_dump(mode="json"), "seed": self.seed, "metrics": metrics}
            save_language_model(
                self.directory, self.student, network, weights, self.tokenizer, self.spec, extra, self.work
            )
            self.work.remove()
        self.processes.wait()
        return TrainResult(metrics | {"seconds": seconds}, self.directory)

    def _fresh(self) -> CausalLm:
        with torch.random.fork_rng(devices=[]):
            return build_language_model(self.student, self.tokenizer)

    def _identity(self) -> dict[str, Any]:
        """Describe the training by all that its weights depend on."""
        told = self.student.model_dump(mode="json", exclude={"tokenizer"})
        if self.student.model is not None and self.student.factory is None:
            told["model"] = content_of_folder(self.student.model)
        # how a step is shared out changes rounding alone: a training may go on with more processes and other micro-batches
        free = {*FREE, "accumulate", "shard", "checkpointing", "device"}
        return {
            "student": told,
            "training": self.training.model_dump(mode="json", exclude=free),
            "objective": objective(self.training, self.spec),
            "hard_share": self.training.hard_share,
            "seed": self.seed,
            "steps": self.steps,
        }


def _open(
    paths: Sequence[str | Path],
    training: TokenTrainConfig,
    seed: int,
    processes: Processes,
    mixing_weights: Sequence[float] | None,
) -> TokenLabelDataset:
    if training.batch_size % processes.size:
        raise ValueError(
            f"training.batch_size must be a multiple of the {processes.size} processes, got {training.batch_size}"
        )
    return TokenLabelDataset(
        list(paths),
        training.batch_size // processes.size,
        seed,
        processes.rank,
        processes.size,
        columns=(),
        mixing_weights=mixing_weights,
        workers=training.loader_workers,
        pin_memory=processes.device.type == "cuda",
    )


def _validation(path: str | Path, spec: SoftLabelSpec) -> TokenLabelDataset:
    found = TokenLabelDataset(path, BLOCKS, 0, columns=())
    for name in ("num_classes", "tokenizer"):
        if getattr(found.spec, name) != getattr(spec, name):
            raise ValueError(
                f"the validation blocks must have the {name} of the labels, {getattr(spec, name)!r}, got {getattr(found.spec, name)!r}"
            )
    return found


def _plain(value: Tensor) -> Tensor:
    full: Any = getattr(value, "full_tensor", None)
    found: Tensor = value if full is None else full()
    return found
