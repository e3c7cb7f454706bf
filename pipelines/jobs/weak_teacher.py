"""The guard before the first purchase: what the teacher is worth beside the student that is to learn from it.

Student 0 and the teacher are compared on the validation rows. A teacher that is no better ends the run; one that is less than
`POINTS` better is believed only as far as the validation set says: `labels.pooled = "auto"` then learns pooled labels.

Ten points, by the settings of studies 1 and 2 (benchmarks/results/science; 11 and 23 of them, pooled minus calibrated against the
teacher's lead over the student of the human labels): no lead (two teachers, of digits), about +1 to +7 points, -1.3 in one; a
lead of up to ten (two settings), nothing on average; a larger one on data that nobody made, -0.2 on average. So the price below
ten points is nothing, and the gain below 0 is the one that counts: a lead that is measured on 200 rows is known to seven points, so
that a bound at 0, which these figures would like as well, would miss it. The evidence is thin below ten points. (On made-up
teachers pooling can pay at any lead: that depends on the shape of their mistakes, which a lead does not tell.)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distilbeam.storage.files import read_json, write_json

if TYPE_CHECKING:
    from distilbeam.pipelines.config import RunConfig
    from distilbeam.pipelines.jobs.directory import RunDirectory
    from distilbeam.pipelines.jobs.run import Run

POINTS = 0.1  # lead from which the teacher's labels are learned as they are; the module's text has why
log = logging.getLogger(__name__)


def weigh_teacher(run: Run) -> None:
    """Compare teacher and student 0 and record what follows, once; nothing where labels are bought already.

    Raises:
      ValueError: the teacher is no better than the student, and nobody has accepted that.
    """
    where, config = run.directory, run.config
    if where.standing.exists() or (where.top / "labels").exists() or not where.student(0).exists():
        return
    standing = _compared(run)
    lead, rows = standing["teacher"] - standing["student"], standing["rows"]
    measured = (
        f"on the {rows:,} validation rows the teacher has {standing['teacher']:.1%} right and student 0, of the human labels "
        f"alone, {standing['student']:.1%}"
    )
    if lead <= 0 and not (config.run.accept_weak_teacher or config.labels.pooled is True):
        raise ValueError(
            f"the teacher is no better than the student that is to learn from it: {measured}; look for a better teacher, or buy "
            "its labels all the same with --accept-weak-teacher (run.accept_weak_teacher = true)"
        )
    reason = _cannot_pool(config)
    pooled = config.labels.pooled
    if pooled == "auto":
        pooled = lead < POINTS and reason is None
        if lead < POINTS:
            what = "pooled labels are learned" if pooled else f"its labels are learned as they are, since {reason}"
            log.warning(
                "%s: less than %.0f points of lead, %s (labels.pooled)",
                measured[0].upper() + measured[1:],
                100 * POINTS,
                what,
            )
    write_json(where.standing, {**standing, "lead": lead, "least_lead": POINTS, "pooled": pooled})


def learns_pooled(setting: bool | str, where: RunDirectory) -> bool:
    """Resolve `labels.pooled`: as it is given, else as was recorded before the first purchase.

    A run of a version that recorded nothing stays what it was: pooled where its first labels are.
    """
    if isinstance(setting, bool):
        return setting
    if where.standing.exists():
        recorded: bool = read_json(where.standing)["pooled"]
        return recorded
    from distilbeam.pipelines.labelling.pooled_labels import (
        is_pooled,
    )  # takes torch's seconds, which a first check does not

    return is_pooled(where.pooled(0))


def _compared(run: Run) -> dict[str, Any]:
    answers, truth = run.answers("validation"), run.truth("validation")
    answered = ~np.isnan(answers).any(axis=1)
    student: Path = run.directory.student(0)
    logits = run.student_logits(student, "validation")
    shares = {
        name: float((said[answered].argmax(axis=1) == truth[answered]).mean())
        for name, said in (("teacher", answers), ("student", logits))
    }
    return {**shares, "rows": int(answered.sum())}


def _cannot_pool(config: RunConfig) -> str | None:
    """Say why pooled labels cannot be learned; None where they can."""
    if config.labels.kind != "dense":
        return f"labels of kind {config.labels.kind} cannot be pooled"
    if config.training.objective != "distill":
        return f"objective {config.training.objective} learns the teacher's own"
    return None if config.training.finetune is None else "no student chose the examples of a fine-tuning"
