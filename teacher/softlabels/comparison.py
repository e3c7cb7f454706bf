"""What labelling a sample again gave: how far what a teacher says now is from what is stored."""

from __future__ import annotations

from dataclasses import dataclass

# A class's frequency in sampled labels leaves its probability by more than Bernstein's bound with chance exp(-this).
UNLIKELY = 25.0


@dataclass(frozen=True)
class Comparison:
    """A random sample labelled again.

    Attributes:
      rows: rows that were labelled again.
      failed: rows that the teacher could not answer now.
      largest_difference: largest difference of a stored probability and the probability now; for sampled labels what is
        left of it after the largest difference that chance explains.
      example_id: the row where it is.
      same_teacher: whether the fingerprint is the one of the labels.
      control: of tokens, the largest difference of two answers of the teacher now, of the same blocks in the same order;
        None where it was asked once.
    """

    rows: int
    failed: int
    largest_difference: float
    example_id: str
    same_teacher: bool
    control: float | None = None
