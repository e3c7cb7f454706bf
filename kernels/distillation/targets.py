"""What a batch of labels asks of the logits, in the one form that every backend reads.

Every objective is a function of n buckets with logits v and a target over them. Dense labels make each class a bucket.
Sparse labels make a bucket of each kept class and, unless the objective looks at the support alone, one more of all the
other classes: with z_j the logits of those others,

    rest = tau * logsumexp_j(z_j / tau)

so that softmax(v / tau) is exactly the student's distribution over the buckets at temperature tau. `truncated_kl`, `ce`
and `sampled` compare classes, hence tau = T and the rest bucket has no target. `tail`, `slam` and the other divergences
(`divergences.py`) compare buckets: teacher and student are bucketed at temperature 1, where the mass of the tail is known,
and then brought to temperature T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distilbeam.kernels.distillation.divergences import FORWARD, Divergence, divergence_of
from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, SampledLabels, TopKLabels, tail_logmass

Objective = Literal[
    "kl", "ce", "tail", "truncated_kl", "renormalised", "sampled", "slam",
    "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv",
]  # fmt: skip
Mixing = Literal["plain", "normalised", "forward"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
MIXINGS: tuple[Mixing, ...] = ("plain", "normalised", "forward")
OTHER_DIVERGENCES: tuple[Objective, ...] = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv")
BUCKETED: tuple[Objective, ...] = (
    "tail",
    "slam",
    *OTHER_DIVERGENCES,
)  # whose rest bucket has the tail's mass as its target
BETA, ALPHA = 0.5, 0.1  # TRL's and DistiLLM's own
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-4, 1e4  # beyond, float32 holds neither z / T nor T^2 times a loss
FLOOR = 1e-7  # the least accuracy: keeps log(mix) finite for classes outside the candidates


@dataclass(frozen=True)
class Targets:
    """A target over buckets, for one objective.

    Attributes:
      logprobs: log of the target, [B, n]; the rest bucket, where there is one, is the last. A bucket without a target
        has the least finite number, and so has padding; among dense labels it may also be -inf.
      classes: the class of each bucket but the rest, int64 [B, k], padding replaced by the row's first class that is none,
        0 where there is none; None when every class is a bucket of its own.
      padding: True where an entry of `classes` is padding, bool [B, k]; None when there is none.
      rest_temperature: tau of the rest bucket; None when there is no such bucket.
      temperature: T, which divides the buckets' logits; the loss is multiplied by its square.
      entropy: subtract the target's own entropy, so that the loss is a divergence.
      accuracy: SLaM's a, [B, 1]; None for the other objectives.
      flip: SLaM's coefficient of the candidates, (1 - a) / (m - 1) or (1 - a), zero elsewhere, [B, n].
      forward: SLaM's candidates share their own mass instead of the complement's.
      certain: one class has all of the target, and the rest has none.
      divergence: of the student's distribution over the buckets from the target; all but `forward` have no `flip`.
    """

    logprobs: Tensor
    classes: Tensor | None = None
    padding: Tensor | None = None
    rest_temperature: float | None = None
    temperature: float = 1.0
    entropy: bool = True
    accuracy: Tensor | None = None
    flip: Tensor | None = None
    forward: bool = False
    certain: bool = False
    divergence: Divergence = FORWARD

    def rows(self, index: Tensor | slice) -> Targets:
        """Take some rows.

        Args:
          index: a slice, a boolean mask or row numbers.

        Returns:
          The targets of those rows.
        """

        def take(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return Targets(
            self.logprobs[index],
            take(self.classes),
            take(self.padding),
            self.rest_temperature,
            self.temperature,
            self.entropy,
            take(self.accuracy),
            take(self.flip),
            self.forward,
            self.certain,
            self.divergence,
        )


@torch.no_grad()
def prepare(
    labels: Labels,
    num_classes: int,
    objective: Objective,
    temperature: float = 1.0,
    accuracy: Tensor | float | None = None,
    candidates: Tensor | int | None = None,
    mixing: Mixing = "normalised",
    dtype: torch.dtype = torch.float32,
    *,
    padded: bool = True,
    beta: float = BETA,
    alpha: float = ALPHA,
) -> Targets:
    """Bring labels to a target over buckets.

    Args:
      labels: the teacher's labels of B rows, or true classes.
      num_classes: C, the columns of the logits.
      objective: one of OBJECTIVES; true classes are always cross-entropy at temperature 1.
      temperature: T > 0.
      accuracy: SLaM's a in [0, 1], [B] or a number; required by `slam`.
      candidates: SLaM's m >= 1, integer [B] or a number; None means 2.
      mixing: SLaM's form, one of MIXINGS.
      dtype: of the computation, float32 or float64.
      padded: whether an entry of a sparse label may be padding.
      beta: of `jsd`.
      alpha: of `skew_kl` and `skew_reverse_kl`.

    Returns:
      The targets; nothing in them requires a gradient.

    Raises:
      ValueError: the objective cannot use these labels, or an argument is missing or out of range.
    """
    if isinstance(labels, HardLabels):
        return _hard(labels, num_classes, dtype)
    check_labels(labels, num_classes, objective, accuracy)
    logprobs, classes, padding, rest = _buckets(labels, num_classes, objective, temperature, dtype, padded)
    if objective != "slam":
        divergence = divergence_of(objective, beta, alpha)
        return Targets(logprobs, classes, padding, rest, temperature, objective != "ce", divergence=divergence)
    rows = logprobs.shape[:1]
    assert accuracy is not None  # `_check` refuses
    a_B1 = _per_row("accuracy", accuracy, rows, logprobs).clamp(FLOOR, 1.0)
    m_B1 = _per_row("candidates", 2 if candidates is None else candidates, rows, logprobs)
    share_B1 = 1 - a_B1 if mixing == "plain" else (1 - a_B1) / (m_B1 - 1).clamp(min=1)
    kept = logprobs if rest is None else logprobs[:, :-1]  # the rest bucket is never a candidate, padding the last one
    kept = kept if padding is None else kept.masked_fill(padding, -torch.inf)
    rank_BK = kept.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    flip = torch.zeros_like(logprobs)
    flip[:, : kept.shape[1]] = share_B1 * (rank_BK < m_B1)
    return Targets(logprobs, classes, padding, rest, temperature, False, a_B1, flip, mixing == "forward")


def _hard(labels: HardLabels, num_classes: int, dtype: torch.dtype) -> Targets:
    # a negative class beside the one to ignore is refused where looking is free, and poisons its row in the kernels
    classes_B1 = labels.classes.long().masked_fill(labels.classes == labels.ignore_index, 0)[:, None]
    of_a_row = torch.zeros(min(2, num_classes), dtype=dtype, device=classes_B1.device)
    of_a_row[1:] = torch.finfo(dtype).min
    logprobs = of_a_row.expand(len(classes_B1), -1)
    if num_classes == 1:
        return Targets(logprobs, classes_B1)
    return Targets(logprobs, classes_B1, rest_temperature=1.0, entropy=False, certain=True)


def _buckets(
    labels: DenseLabels | TopKLabels | SampledLabels,
    num_classes: int,
    objective: Objective,
    temperature: float,
    dtype: torch.dtype,
    padded: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, float | None]:
    logprobs = labels.logprobs.to(dtype)
    if isinstance(labels, DenseLabels):
        return _tempered(logprobs, temperature), None, None, None
    classes, padding = labels.classes.long(), None
    if padded:
        padding = classes < 0
        logprobs = logprobs.masked_fill(padding, -torch.inf)
        first_B1 = padding.to(torch.int8).argmin(dim=1, keepdim=True)
        classes = torch.where(padding, classes.gather(1, first_B1), classes).clamp(min=0)
    tail = _tail(labels, logprobs, padding, num_classes) if objective != "renormalised" else None
    if tail is not None:
        logprobs = torch.cat([logprobs, tail], dim=1)
    least = torch.finfo(dtype).min  # not -inf: 0 * -inf is no 0
    without_B1 = torch.isneginf(logprobs.amax(dim=1, keepdim=True))  # a row of padding alone has no target
    logprobs = _tempered(logprobs.masked_fill(without_B1, 0), temperature).clamp(min=least)
    logprobs = logprobs.masked_fill(without_B1, least)
    if objective == "renormalised" or (padding is None and tail is None and logprobs.shape[1] == num_classes):
        return logprobs, classes, padding, None
    nothing = torch.full_like(logprobs[:, :1], least)
    if objective in BUCKETED:
        return (logprobs if tail is not None else torch.cat([logprobs, nothing], 1)), classes, padding, 1.0
    kept = logprobs if tail is None else logprobs[:, :-1]
    return torch.cat([kept, nothing], 1), classes, padding, temperature


def _tempered(logprobs: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logprobs if temperature == 1 else logprobs / temperature, dim=1)


def _tail(
    labels: TopKLabels | SampledLabels, logprobs: Tensor, padding: Tensor | None, num_classes: int
) -> Tensor | None:
    """Give the tail's log-mass as a column, or None where the label has no tail."""
    full = logprobs.shape[1] >= num_classes
    if isinstance(labels, SampledLabels) or (full and padding is None):
        return None
    mass = tail_logmass(logprobs) if labels.tail_logmass is None else labels.tail_logmass
    mass_B1 = mass.to(logprobs.dtype)[:, None]
    if full and padding is not None:  # a row that keeps every class has no others that its tail could be of
        mass_B1 = mass_B1.masked_fill(~padding.any(dim=1, keepdim=True), -torch.inf)
    return mass_B1


def _per_row(name: str, value: Tensor | float, rows: torch.Size, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.to(dtype=like.dtype, device=like.device)
    else:
        tensor = torch.full((), value, dtype=like.dtype, device=like.device)  # copies nothing to a GPU
    if tensor.ndim and tensor.shape != rows:
        raise ValueError(f"{name} must be a number or have one value per row, {list(rows)}, got {list(tensor.shape)}")
    return tensor.expand(rows)[:, None]


def check_labels(
    labels: DenseLabels | TopKLabels | SampledLabels,
    num_classes: int,
    objective: Objective,
    accuracy: Tensor | float | None,
) -> None:
    """Refuse labels that do not fit the logits or the objective."""
    width = labels.logprobs.shape[1]
    if isinstance(labels, DenseLabels) and width != num_classes:
        raise ValueError(f"dense labels must have the {num_classes} classes of the logits, got {width}")
    if isinstance(labels, TopKLabels) and width > num_classes:
        raise ValueError(f"top-k labels must keep at most the {num_classes} classes of the logits, got {width}")
    if isinstance(labels, SampledLabels):
        _check_sampled(objective)
    if objective == "kl" and isinstance(labels, TopKLabels) and width < num_classes:
        raise ValueError(
            f"objective 'kl' needs all {num_classes} classes, top-k labels keep {width}: use 'tail', which compares what they "
            "leave out too, or 'truncated_kl' for the kept classes alone, which pulls the student's whole mass onto them"
        )
    if objective == "sampled" and isinstance(labels, TopKLabels):
        raise ValueError("objective 'sampled' needs sampled labels, got top-k labels: use 'tail' or 'renormalised'")
    if objective == "slam" and accuracy is None:
        raise ValueError("objective 'slam' needs accuracy, the probability that the teacher is right on each row")


def _check_sampled(objective: Objective) -> None:
    """Refuse what the frequencies of draws do not estimate without bias, or have not got."""
    if objective == "tail":
        raise ValueError("objective 'tail' needs the mass that was left out, sampled labels have none: use 'sampled'")
    if objective == "truncated_kl":
        raise ValueError(
            "objective 'truncated_kl' is for top-k labels, sampled labels leave nothing out: use 'sampled'"
        )
    if objective in OTHER_DIVERGENCES:
        raise ValueError(
            f"objective {objective!r} is biased on sampled labels, whose gradient is right on average for forward KL alone: use "
            "'sampled', or top-k labels"
        )
