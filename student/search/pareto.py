"""Students along the front of quality against footprint.

Two strategies for a smaller student of the same quality, or a better one of the same size (Menghani, Efficient Deep Learning, 2021, section 4):

* shrink-and-improve: make the network narrower, then win quality back with soft labels and augmentation, then compress;
* grow-improve-and-shrink: make it wider, improve the wide one, then shrink it back by structured pruning and a short
  training, then compress.

`plan` lists the students to make, each with the one that it is made from; `front` says which of the results no other is
at once better and cheaper than.

References:
  Menghani, Efficient Deep Learning, arXiv:2106.08962, section 4 (the two strategies) and its Pareto view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilbeam.student.search.space import ParetoConfig


@dataclass(frozen=True)
class Stage:
    """A student to make.

    Attributes:
      name: of its directory.
      action: `train` from random weights; `prune` another and train it again; `compress` another.
      width: multiple of the configured width that the stage is for.
      built: multiple of the configured width that its network was built with.
      strategy: what it belongs to: `shrink` alone, or one of the two strategies.
      form: `float32`, or the compressed format.
      labels: whether it learns from soft labels and with augmentation, or from human labels alone.
      source: name of the stage that it is made from.
      shown: whether it is a point of its own, or only a step on the way.
    """

    name: str
    action: str
    width: float
    built: float
    strategy: str
    form: str = "float32"
    labels: bool = True
    source: str | None = None
    shown: bool = True


def plan(config: ParetoConfig) -> list[Stage]:
    """List the students to make, each after the one it is made from.

    Args:
      config: widths, strategies and compressions.

    Returns:
      The stages; a wide network that is also one of the widths is made once.
    """
    stages: dict[str, Stage] = {}
    if "shrink-and-improve" in config.strategies:
        for width in config.widths:
            _add(stages, Stage(f"shrunk-{width:g}", "train", width, width, "shrink", labels=False))
            improved = Stage(f"improved-{width:g}", "train", width, width, "shrink-and-improve")
            _add(stages, improved, *_compressed(improved, config))
    if "grow-improve-and-shrink" in config.strategies:
        for width in config.widths:
            wide = width * config.grow
            grown = Stage(f"improved-{wide:g}", "train", wide, wide, "grow-improve-and-shrink", shown=False)
            back = Stage(f"pruned-{width:g}", "prune", width, wide, "grow-improve-and-shrink", source=grown.name)
            _add(stages, grown, back, *_compressed(back, config))
    return list(stages.values())


def front(points: Sequence[Mapping[str, Any]], cost: str, quality: str) -> list[bool]:
    """Say which points are on the front: no other is at most as costly and at least as good, and one of both strictly.

    Args:
      points: with numbers under the two names.
      cost: name of what should be small.
      quality: name of what should be large.

    Returns:
      One answer per point; equal points are on the front together.
    """
    pairs = [(point[cost], point[quality]) for point in points]
    return [not any(c <= cost_ and q >= good and (c, q) != (cost_, good) for c, q in pairs) for cost_, good in pairs]


def _compressed(stage: Stage, config: ParetoConfig) -> list[Stage]:
    return [
        Stage(f"{stage.name}-{form}", "compress", stage.width, stage.built, stage.strategy, form, source=stage.name)
        for form in config.compressions
    ]


def _add(stages: dict[str, Stage], *more: Stage) -> None:
    for stage in more:
        stages.setdefault(stage.name, stage)
