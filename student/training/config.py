"""Configuration of a training: typed, frozen, validated at construction."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from distilbeam.settings import Section

Objective = Literal[
    "distill", "weighted", "slam", "slam+weighted",
    "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "truncated_kl",
]  # fmt: skip
# objectives of the kernels' own names, which see the whole distribution or what a top-k label keeps of it
DIVERGENCES: tuple[Objective, ...] = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv", "truncated_kl")

# settings that change what is seen and kept of a training, not what it learns: a stopped one may go on with others
FREE = ("loader_workers", "checkpoint_steps", "checkpoint_seconds", "keep", "log_steps", "tensorboard", "track")
# settings of a run's last training, which `train` itself has no use for
LAST = ("self_training", "ensemble", "pseudo_rows", "final_training")


class AugmentConfig(Section):
    """Random changes of inputs and labels; all off by default."""

    model_config = ConfigDict(allow_inf_nan=False)

    flip: bool = Field(False, description="mirror every other image, left to right")
    crop: int = Field(0, ge=0, description="images: shift by up to so many pixels, the border mirrored")
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="texts: share of the words, n-grams or tokens that a pass does not see"
    )
    mixup: float = Field(0.0, ge=0, description="mix examples and their labels by Beta(mixup, mixup); 0: never")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="human labels: mass spread over all classes")


class FinetuneConfig(Section):
    """Second phase for a pool from another distribution: soft labels alone first, then labelled examples (blind)."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: int = Field(30, ge=1, le=1_000_000, description="passes over the labelled examples")
    lr: float = Field(3e-4, gt=0, description="learning rate at the start; it falls to 0 along a half cosine")
    hard_weight: float = Field(1.0, ge=0, description="weight of the true class beside the teacher's answer's 1")


class LoopConfig(Section):
    """What every training has: passes, steps, optimizer, checkpoints, logs."""

    model_config = ConfigDict(allow_inf_nan=False)

    epochs: int = Field(60, ge=1, le=1_000_000, description="passes over the data")
    batch_size: int = Field(64, ge=1, description="examples per step, over all processes together")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd has Nesterov momentum 0.9")
    lr: float = Field(3e-3, gt=0, description="largest learning rate")
    weight_decay: float = Field(1e-2, ge=0, description="of matrices; biases, norms and learned residuals have none")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="the learning rate after the warm-up")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    temperature: float = Field(1.0, gt=0, description="softens teacher and student")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the weights, which is then validated and kept"
    )
    device: str = Field("cpu", description="cpu, cuda, cuda:1, tpu, ...; auto takes the accelerator if there is one")
    loader_workers: int = Field(
        1, ge=1, description="threads that make batches of soft-labelled rows; as many, two at least, read"
    )
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints, beside the seconds")
    checkpoint_seconds: float = Field(60.0, ge=0, description="seconds between the checkpoints that a killed run needs")
    keep: int = Field(2, ge=1, description="checkpoints of a training under way that are kept")
    log_steps: int | None = Field(None, ge=1, description="steps between lines of metrics.jsonl, beside every epoch's")
    tensorboard: bool = Field(False, description="write TensorBoard events too (extra: tensorboard)")
    track: Literal["tensorboard", "mlflow", "wandb"] | None = Field(
        None,
        description="tell an experiment tracker too, by its own package (an extra of its name), in a folder beside the student "
        "and without a network",
    )


class TrainConfig(LoopConfig):
    """How a student is trained; the seed is an argument of the training itself."""

    model_config = ConfigDict(allow_inf_nan=False)

    objective: Objective = Field(
        "distill",
        description="distill: forward KL; weighted: debiased by the column weight; slam: student-label mixing, by the columns "
        "alpha and candidates; or both, slam+weighted; reverse_kl, jsd, skew_kl, skew_reverse_kl or tv, which is total "
        "variation: other divergences, of dense or top_k labels; truncated_kl: the classes that top_k labels keep alone",
    )
    beta: float | None = Field(
        None, ge=0, le=1, description="jsd: 0 is forward KL, 1 reverse KL; unset means 0.5, in the middle"
    )
    alpha: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="skew_kl, skew_reverse_kl: share of the first distribution in what it is compared with; unset means 0.1",
    )
    hard_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the cross-entropy to the teacher's likeliest class in the loss of a soft-labelled example",
    )
    mixing: Literal["plain", "normalised", "forward"] = Field(
        "forward",
        description="slam: form of the mixture; forward held where it was measured, the paper's plain one did not",
    )
    hard_weight: float = Field(
        1.0, ge=0, description="weight of a human-labelled example beside a soft-labelled one's 1"
    )
    reestimate_epochs: int | None = Field(
        None, ge=1, description="weighted: epochs after which the weights are estimated again from the current student"
    )
    self_training: bool = Field(
        True,
        description="runs: learn an ensemble's soft pseudo-labels for rows that were not bought, in a last training, where that "
        "is better on validation rows that nobody has learned who judges them",
    )
    ensemble: int = Field(
        5, ge=1, le=1_000, description="runs: students of the ensemble, and folds of the validation set"
    )
    pseudo_rows: int = Field(
        32_768, ge=1, description="runs: most rows that get pseudo-labels; of more they are drawn by chance"
    )
    final_training: Literal["auto", "all", "apart"] = Field(
        "auto",
        description="runs: all: the last training learns the validation rows too; without data.test its figures are then those of "
        "cross-fitted students, each on the fold that it has not learned; apart: it does not; auto: all where there is a test set",
    )
    finetune: FinetuneConfig | None = Field(None, description="blind distillation: settings of the second phase")
    augment: AugmentConfig = Field(AugmentConfig(), description="random changes of inputs and labels")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better validation loss before training stops"
    )
    precision: Literal["fp32", "bf16", "fp8", "int8"] = Field(
        "fp32", description="of the student's matrix products; fp8 and int8 where a layer's shape allows it, else bf16"
    )
    precision_gate: Literal["table", "sizes"] = Field(
        "table", description="fp8, int8: only layers that they make faster on this device, or all that fit"
    )
    last_layer: Literal["table", "together", "apart"] = Field(
        "table",
        description="the student's last layer and the loss: in one operation that holds no logits where a measured table says "
        "that it pays, always, or never",
    )
    compile: bool = Field(False, description="run the student through torch.compile")

    @model_validator(mode="after")
    def _reestimated_weights_are_used(self) -> Self:
        if self.reestimate_epochs is not None and "weighted" not in self.objective:
            raise ValueError(
                f"reestimate_epochs is for the objectives weighted and slam+weighted, got objective {self.objective!r}"
            )
        return self

    @model_validator(mode="after")
    def _the_objective_has_what_it_is_given(self) -> Self:
        for name, needed in (("beta", ("jsd",)), ("alpha", ("skew_kl", "skew_reverse_kl"))):
            if getattr(self, name) is not None and self.objective not in needed:
                plural = "s" if len(needed) > 1 else ""
                raise ValueError(f"{name} is for the objective{plural} {' and '.join(needed)}, got {self.objective!r}")
        if self.hard_share and self.objective.startswith("slam"):
            raise ValueError(
                f"hard_share must be 0 with objective {self.objective!r}, which takes the teacher's mistakes out of the loss that "
                f"its likeliest class would put back, got {self.hard_share:g}"
            )
        return self


def check_kind(objective: Objective, kind: str) -> None:
    """Refuse labels of a kind that an objective cannot learn from.

    Args:
      objective: of a training.
      kind: of its soft labels, `dense`, `top_k` or `sampled`.

    Raises:
      ValueError: the labels are draws, which give forward KL alone without bias.
    """
    if kind == "sampled" and objective in DIVERGENCES:
        raise ValueError(
            f"training.objective must be 'distill' with labels of kind 'sampled', whose draws are unbiased for forward KL alone, "
            f"got {objective!r}; label with kind 'top_k' for it"
        )
