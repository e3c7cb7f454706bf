"""Random calls of the distillation losses, with labels that a codec writes and people do write, and their exact results.

The oracle takes a row at a time in float64, leaves out what does not exist before it computes anything, and lets autograd
differentiate these few lines; it shares no code with the library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, SampledLabels, TopKLabels

KINDS = {
    "kl": ("dense",),
    "truncated_kl": ("top_k",),
    "ce": ("dense", "top_k", "sampled", "hard"),
    "tail": ("top_k",),
    "renormalised": ("top_k", "sampled"),
    "sampled": ("sampled",),
    "slam": ("dense", "top_k", "sampled"),
    "reverse_kl": ("dense", "top_k"),
    "jsd": ("dense", "top_k"),
    "skew_kl": ("dense", "top_k"),
    "skew_reverse_kl": ("dense", "top_k"),
    "tv": ("dense", "top_k"),
}
OTHER_DIVERGENCES = ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv")
LEAST = 2.0**-126  # what a teacher's probability of 0 counts as where a reverse KL would be infinite
Entry = tuple[Tensor, float, int]  # a bucket's logit, the log of its target, its place


@dataclass(frozen=True)
class LossCase:
    """A call: the logits, the labels and the other arguments, and what the rows that do not count are filled with."""

    logits: Tensor
    labels: Labels
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> np.ndarray:
        """Rows that count for the label."""
        counts = np.ones(len(self.logits), dtype=bool)
        if self.options.get("mask") is not None:
            counts &= self.options["mask"].numpy()
        if isinstance(self.labels, HardLabels):
            counts &= self.labels.classes.numpy() != self.labels.ignore_index
        return counts


def random_case(
    seed: int,
    dtypes: tuple[torch.dtype, ...],
    kinds: tuple[str, ...] = ("dense", "top_k", "sampled", "hard"),
    sizes: tuple[int, int, int] | None = None,
) -> LossCase:
    """Draw a case.

    Args:
      seed: of everything.
      dtypes: of the logits, one of them.
      kinds: of the labels, one of them.
      sizes: rows, classes and kept classes; None draws these too.
    """
    draw = np.random.default_rng(seed)
    pairs = [(objective, kind) for objective, known in KINDS.items() for kind in known if kind in kinds]
    objective, kind = pairs[draw.integers(len(pairs))]
    rows, classes = int(draw.choice([0, 1, 2, 3, 5, 9])), int(draw.choice([2, 3, 5, 10, 33, 140]))
    k = int(draw.integers(1, min(classes, 12) + 1))
    rows, classes, k = sizes or (rows, classes, k)
    dtype = dtypes[draw.integers(len(dtypes))]
    exists = np.ones(classes, dtype=bool)
    if draw.random() < 0.2 and classes > 3:
        exists[draw.permutation(classes)[: classes // 3]] = False
    options = _options(draw, objective, rows, classes)
    logits = _logits(draw, rows, classes, dtype, exists)
    labels = _labels(draw, kind, rows, classes, k)
    return LossCase(*_spoiled(draw, logits, labels, options), options)


def _logits(draw: np.random.Generator, rows: int, classes: int, dtype: torch.dtype, exists: np.ndarray) -> Tensor:
    z = draw.choice([0.3, 2.0, 30.0]) * draw.standard_normal((rows, classes))
    if dtype in (torch.float32, torch.float64):
        z += draw.choice([0.0, 0.0, 1e4, -3e3]) + draw.choice([0.0, 100.0]) * draw.standard_normal((rows, 1))
    z[:, ~exists] = -np.inf
    logits = torch.from_numpy(z).to(dtype)
    layout = draw.integers(4)
    if layout == 1:
        return logits.T.contiguous().T
    if layout == 2:
        wide = torch.full((rows, 2 * classes + 3), torch.nan, dtype=dtype)
        wide[:, 1 : 2 * classes : 2] = logits
        return wide[:, 1 : 2 * classes : 2]
    if layout == 3:
        wide = torch.full((rows, classes + 5), torch.nan, dtype=dtype)
        wide[:, 2 : classes + 2] = logits
        return wide[:, 2 : classes + 2]
    return logits


def _options(draw: np.random.Generator, objective: str, rows: int, classes: int) -> dict[str, Any]:
    options: dict[str, Any] = {"objective": objective, "temperature": float(draw.choice([1.0, 1.0, 0.5, 2.0, 7.0]))}
    options["reduction"] = str(draw.choice(["mean", "sum", "none"]))
    if draw.random() < 0.3:
        options["weight"] = torch.from_numpy(draw.choice([0.0, 0.3, 1.0, 2.5], rows)).float()
    if draw.random() < 0.35:
        options["mask"] = torch.from_numpy(draw.random(rows) < draw.choice([0.0, 0.6]))
    if draw.random() < 0.2:
        options["normalizer"] = float(draw.choice([0.5, 7.0]))
    if draw.random() < 0.25:
        hard = draw.integers(0, classes, rows)
        hard[draw.random(rows) < 0.4] = -100
        options |= {"hard": torch.from_numpy(hard), "hard_share": float(draw.choice([0.0, 0.4, 1.0]))}
    if objective == "jsd":
        options["beta"] = float(draw.choice([0.0, 0.1, 0.5, 0.9, 1.0]))
    if objective.startswith("skew"):
        options["alpha"] = float(draw.choice([0.0, 0.1, 0.5, 0.9]))
    if objective == "slam":
        options["mixing"] = str(draw.choice(["plain", "normalised", "forward"]))
        chosen = [0.4, 0.9, 1.0] if draw.random() < 0.9 else [0.0, 0.9]
        accuracy = torch.from_numpy(draw.choice(chosen, rows)).float()
        options["accuracy"] = accuracy if draw.random() < 0.7 else 0.7
        options["candidates"] = torch.from_numpy(draw.integers(1, 6, rows)) if draw.random() < 0.7 else 3
    return options


def _labels(draw: np.random.Generator, kind: str, rows: int, classes: int, k: int) -> Labels:
    if kind == "hard":
        ignored = int(draw.choice([-100, -1, 0]))
        chosen = draw.integers(0, classes, rows)
        chosen[draw.random(rows) < 0.3] = ignored
        return HardLabels(torch.from_numpy(chosen), ignored)
    logprobs = torch.from_numpy(draw.choice([1.0, 5.0, 40.0]) * draw.standard_normal((rows, classes))).log_softmax(1)
    if draw.random() < 0.3:  # probabilities of 0, and of 1
        logprobs[torch.from_numpy(draw.random((rows, classes)) < draw.choice([0.3, 0.95]))] = -torch.inf
        best = torch.from_numpy(draw.integers(0, classes, rows))
        logprobs[torch.arange(rows), best] = -0.2
        logprobs = logprobs.log_softmax(1)
    if draw.random() < 0.4:  # as they are stored
        logprobs = logprobs.half()
    if kind == "dense":
        return DenseLabels(logprobs.float())
    top = logprobs.float().topk(k, dim=1)
    values, chosen = top.values.clone(), top.indices.clone()
    tail = torch.log1p(-values.double().exp().sum(1).clamp(max=1)).float()  # -inf where nothing is left
    if k < classes and draw.random() < 0.25 and k > 1:  # a class named twice
        twice = torch.from_numpy(draw.random(rows) < 0.5)
        chosen[twice, -1] = chosen[twice, 0]
    if draw.random() < 0.35:  # padding at the end, in front, anywhere, everywhere
        padding = torch.from_numpy(draw.random((rows, k)) < 0.4)
        if draw.random() < 0.8:
            padding[torch.arange(rows), torch.from_numpy(draw.integers(0, k, rows))] = False
        chosen[padding], values[padding] = int(draw.choice([-1, -100])), float(draw.choice([-np.inf, 0.0, np.nan]))
    if kind == "sampled":
        draws = values.masked_fill(chosen < 0, -torch.inf)
        whole = draws.logsumexp(1, keepdim=True)
        return SampledLabels(torch.where(whole.isneginf() | (chosen < 0), values, draws - whole), chosen)
    return TopKLabels(values, chosen, tail)


def _spoiled(
    draw: np.random.Generator, logits: Tensor, labels: Labels, options: dict[str, Any]
) -> tuple[Tensor, Labels]:
    """Put anything into the rows that do not count."""
    case = LossCase(logits, labels, options)
    nobody = torch.from_numpy(~case.count)
    if not bool(nobody.any()):
        return logits, labels
    logits[nobody] = float(draw.choice([np.nan, -np.inf, np.inf]))
    if not isinstance(labels, HardLabels):
        labels.logprobs[nobody] = float(draw.choice([np.nan, -np.inf]))
    return logits, labels


def exact(case: LossCase, logits: Tensor) -> Tensor:
    """Compute the result of a case in float64, differentiable in the logits, which are float64."""
    options, rows = case.options, len(logits)
    hard, counts = options.get("hard"), case.count
    scale = np.ones(rows) if options.get("weight") is None else options["weight"].double().numpy()
    if options["reduction"] == "mean":
        scale = scale / (options.get("normalizer") or max(1, int(counts.sum())))
    losses = []
    for i in range(rows):
        loss = logits.new_zeros(())
        known = hard is not None and int(hard[i]) != -100
        share = options["hard_share"] if known else 0.0
        if counts[i]:
            z = _from_largest(logits[i])
            loss = loss + (1 - share) * row_loss(z, case.labels, i, options)
            if known:
                loss = loss + share * _true_class(z, int(hard[i]))
            loss = loss * float(scale[i])
        losses.append(loss)
    total = torch.stack(losses) if losses else logits.new_zeros(0)
    return total if options["reduction"] == "none" else total.sum()


def _from_largest(z: Tensor) -> Tensor:
    """Count logits from their largest: of an offset of 10,000 float64 would keep twelve digits behind the point."""
    there = z.detach()[~torch.isneginf(z)]
    return z - there.max() if len(there) else z


def _true_class(z: Tensor, one: int) -> Tensor:
    if torch.isneginf(z[one]):  # a class that does not exist takes no target
        return z.new_zeros(())
    return torch.logsumexp(z[~torch.isneginf(z)], 0) - z[one]


def row_loss(z: Tensor, labels: Labels, i: int, options: dict[str, Any]) -> Tensor:
    """Compute the loss of one row."""
    if isinstance(labels, HardLabels):
        return _true_class(z, int(labels.classes[i]))
    objective, T = options["objective"], options["temperature"]
    logprobs = labels.logprobs[i].double()
    if isinstance(labels, DenseLabels):
        entries = [(c, float(logprobs[c])) for c in range(len(z))]
        rest, tail = [], -math.inf
    else:
        chosen = labels.classes[i].tolist()
        entries = [(c, float(logprobs[e])) for e, c in enumerate(chosen) if c >= 0]
        rest = sorted(set(range(len(z))) - {c for c, _ in entries})
        whole = len(chosen) >= len(z) and len(entries) == len(chosen)
        tail = float(labels.tail_logmass[i]) if isinstance(labels, TopKLabels) and not whole else -math.inf
    if objective == "renormalised":
        rest, tail = [], -math.inf
    target = _tempered([p for _, p in entries] + [tail], T)
    buckets = [(z[c], y) for (c, _), y in zip(entries, target, strict=False)]
    if objective in ("kl", "ce", "sampled", "truncated_kl") or isinstance(labels, DenseLabels):
        others = [z[c] / T for c in rest if not torch.isneginf(z[c])]
        last = [(T * torch.logsumexp(torch.stack(others), 0), 0.0)] if others else []
    else:
        others = [z[c] for c in rest if not torch.isneginf(z[c])]
        last = [(torch.logsumexp(torch.stack(others), 0), target[-1])] if others else []
    order = sorted(range(len(entries)), key=lambda e: -entries[e][1])
    candidates = set(order[: _of_row(options.get("candidates", 2), i)])
    there = [(v, y, e in candidates) for e, (v, y) in enumerate([*buckets, *last]) if not torch.isneginf(v)]
    if not there:
        return z.new_zeros(())
    logf = torch.log_softmax(torch.stack([v for v, _, _ in there]) / T, 0)
    y = torch.tensor([y for _, y, _ in there], dtype=torch.float64)
    if objective == "slam":
        logf = _mixed(logf, [c for *_, c in there], _of_row(options["accuracy"], i), options, i)
    if objective in OTHER_DIVERGENCES:
        return T**2 * other_divergence(objective, y, logf, options) if float(y.sum()) >= LEAST else z.new_zeros(())
    entropy = 0.0 if objective in ("ce", "slam") else float((y[y > 0] * y[y > 0].log()).sum())
    return T**2 * (entropy - (y[y > 0] * logf[y > 0]).sum())


def other_divergence(objective: str, p: Tensor, logq: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute a divergence from its definition, in probabilities."""
    q = logq.exp()
    if objective == "tv":
        return (p - q).abs().sum() / 2
    reverse = (q * (logq - p.clamp(min=LEAST).log())).sum()
    forward = (p[p > 0] * (p[p > 0].log() - logq[p > 0])).sum()
    beta, alpha = options.get("beta", 0.5), options.get("alpha", 0.1)
    if objective == "jsd" and 0 < beta < 1:
        logm = (beta * p + (1 - beta) * q).log()
        of_p = (p[p > 0] * (p[p > 0].log() - logm[p > 0])).sum()
        return beta * of_p + (1 - beta) * (q * (logq - logm)).sum()
    if objective == "skew_kl" and alpha > 0:
        return (p[p > 0] * (p[p > 0].log() - (alpha * p + (1 - alpha) * q)[p > 0].log())).sum()
    if objective == "skew_reverse_kl" and alpha > 0:
        return (q * (logq - ((1 - alpha) * p + alpha * q).log())).sum()
    return forward if objective == "skew_kl" or (objective == "jsd" and beta == 0) else reverse


def _tempered(logprobs: list[float], temperature: float) -> list[float]:
    largest = max(logprobs)
    if largest == -math.inf:
        return [0.0] * len(logprobs)
    e = [math.exp((p - largest) / temperature) for p in logprobs]
    return [x / sum(e) for x in e]


def _mixed(logf: Tensor, candidate: list[bool], accuracy: float, options: dict[str, Any], i: int) -> Tensor:
    m = _of_row(options["candidates"], i)
    a = max(accuracy, 1e-7)
    share = (1 - a) if options["mixing"] == "plain" else (1 - a) / max(m - 1, 1)
    flags = torch.tensor(candidate)
    f = logf.exp()
    reach = f[flags].sum() if options["mixing"] == "forward" else 1.0
    mixed = a * f + share * (reach - f)
    return torch.where(flags, mixed.masked_fill(~flags, 1).log(), math.log(a) + logf)


def _of_row(value: Any, i: int) -> Any:
    return value[i].item() if isinstance(value, Tensor) else value
