"""Which token a list of log-probabilities describes: its own, or the next one.

Both are in the wild: the j-th list of a row describes token j (`own`), as servers answer about prompts, or token j + 1
(`next`), as a model's output at j does. Nothing in the data says which, but the text does: a teacher has the token that
is there among its most probable ones far more often where the lists are held against the right tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.conversion.rows import PeerRow

Alignment = Literal["own", "next"]
ALIGNMENTS: tuple[Alignment, ...] = ("own", "next")
# of real text and 64 classes .79 to .89 at the right shift, .10 to .42 at the wrong one
_RIGHT, _WRONG = 0.6, 0.5
_FEWEST = 32  # tokens: three standard errors of a share are .27 then, of .8 against .42 just enough
_MOST_ROWS = 256


@dataclass
class Evidence:
    """What some rows say of both alignments, added up.

    Attributes:
      tokens: tokens that have a list, by alignment.
      hits: of these, those that are in it.
      fewest: the smallest number of classes of a list that has any; None before there is one.
    """

    tokens: dict[Alignment, int] = field(default_factory=lambda: dict.fromkeys(ALIGNMENTS, 0))
    hits: dict[Alignment, int] = field(default_factory=lambda: dict.fromkeys(ALIGNMENTS, 0))
    fewest: int | None = None

    def add(self, rows: Iterable[PeerRow]) -> None:
        """Count the first rows of a file."""
        for row in islice(rows, _MOST_ROWS):
            counts = (row.classes >= 0).sum(axis=1)
            if counts.any():
                self.fewest = min(int(counts[counts > 0].min()), self.fewest or int(counts.max()))
            for alignment in ALIGNMENTS:
                lists = described(row, alignment)
                at = np.flatnonzero(lists >= 0)
                self.tokens[alignment] += len(at)
                self.hits[alignment] += int((row.classes[lists[at]] == row.ids[at, None]).any(axis=1).sum())

    def share(self, alignment: Alignment) -> float:
        """Return the share of tokens that are among the classes of their lists."""
        return self.hits[alignment] / max(1, self.tokens[alignment])

    def merge(self, other: Evidence) -> None:
        """Add what other rows say."""
        for alignment in ALIGNMENTS:
            self.tokens[alignment] += other.tokens[alignment]
            self.hits[alignment] += other.hits[alignment]
        if other.fewest is not None:
            self.fewest = min(other.fewest, self.fewest or other.fewest)

    def clear(self) -> Alignment | None:
        """Return the alignment that the rows have; None where they do not say."""
        better, worse = sorted(ALIGNMENTS, key=self.share, reverse=True)
        clear = self.share(better) >= _RIGHT and self.share(worse) <= _WRONG
        return better if clear and min(self.tokens.values()) >= _FEWEST else None

    def require(self) -> Alignment:
        """Return the alignment that the rows have.

        Raises:
          ValueError: they do not say.
        """
        found = self.clear()
        if found is None:
            raise ValueError(
                f"--alignment must be given: the text's token is among its list's classes in {self.share('own'):.2f} of "
                f"{self.tokens['own']:,} tokens if a list describes its own token (own) and in {self.share('next'):.2f} of "
                f"{self.tokens['next']:,} if the one behind it (next), which is not clear"
            )
        return found


def described(row: PeerRow, alignment: Alignment) -> npt.NDArray[np.int64]:
    """Find the list of each token.

    Args:
      row: with R lists for its T tokens.
      alignment: whether a list describes its own token or the next one.

    Returns:
      int64 [T], the number of the list that describes a token; -1 where there is none or an empty one, for the first token,
      for padding, and for tokens that are not to be predicted.
    """
    places: npt.NDArray[np.int64] = np.arange(len(row.ids)) - row.first - int(alignment == "next")
    there: npt.NDArray[np.bool_] = (places >= 0) & (places < len(row.classes)) & row.predicted
    there[:1] = False
    there[1:] &= row.seen[1:] & row.seen[:-1]
    full = row.classes.max(axis=1, initial=-1) >= 0
    there[there] = full[places[there]]
    return np.where(there, places, -1)
