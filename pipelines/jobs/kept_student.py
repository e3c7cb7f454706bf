"""Which of a run's students is kept: the last one, unless a round made the student worse.

A student is worse than the one kept so far where McNemar's exact test on the validation rows says so at `LEVEL` (one-sided): of
the rows that changed sides, so many are lost that two equally good students would lose them in one of twenty cases at most.
Within that uncertainty the later student is kept, which has learned from more labels. Each student's epoch was chosen on the
same rows, which flatters all of them alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distilbeam.pipelines.jobs.run import Run
from distilbeam.student.evaluation.paired import Paired, paired

LEVEL = 0.05


def kept_round(run: Run, rounds: int | None = None) -> tuple[int, list[dict[str, Any]]]:
    """Find the student that is kept among those of the first rounds.

    Args:
      run: the run.
      rounds: how many; all of the configuration's without it.

    Returns:
      The round of the kept student, and for each round that made the student worse `round`, `beside` (the round of the one
      that was kept) and what `Paired` has.

    Raises:
      ValueError: there is no student yet.
    """
    where = run.directory
    last = run.config.run.rounds if rounds is None else rounds
    numbers = [number for number in where.trained(last) if where.student(number).exists()]
    if not numbers:
        raise ValueError(f"{where.root} has no student yet; 'distilbeam train CONFIG' trains the first")
    truth = run.truth("validation")
    kept, worse = numbers[0], []
    right = run.student_logits(where.student(kept), "validation").argmax(axis=1) == truth
    for number in numbers[1:]:
        now = run.student_logits(where.student(number), "validation").argmax(axis=1) == truth
        found = paired(right, now)
        if found.p < LEVEL:
            worse.append({"round": number, "beside": kept, **found._asdict()})
        else:
            kept, right = number, now
    return kept, worse


def kept_student(run: Run, number: int | None = None) -> Path:
    """Give the student of a round, or the one that is kept.

    Raises:
      ValueError: there is none.
    """
    return run.last_student(kept_round(run)[0] if number is None else number)


def worse_sentence(found: dict[str, Any]) -> str:
    """Say that a round made the student worse; see `kept_round`."""
    change = Paired(*(found[name] for name in Paired._fields))
    return (
        f"Round {found['round']} made the student worse: {change.after:.1%} of the validation rows right after {change.before:.1%} "
        f"({change.lost:,} lost, {change.won:,} won, p = {change.p:.2g}); the student of round {found['beside']} is kept"
    )
