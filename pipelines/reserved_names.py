"""Names that soft labels use for columns of their own: what is read or carried must not have one."""

from __future__ import annotations

from collections.abc import Iterable

from distilbeam.teacher.softlabels.columns import RESERVED, RESERVED_PREFIX, WEIGHTS


def require_free_names(columns: Iterable[str], setting: str) -> None:
    """Refuse columns that soft labels would replace by theirs, or that a reader of them would take for theirs.

    Args:
      columns: names of columns that are read or carried.
      setting: what named them.

    Raises:
      ValueError: one has such a name; the message says which, and the way out.
    """
    for name in columns:
        if name in RESERVED or name.startswith(RESERVED_PREFIX):
            raise ValueError(
                f"{setting}: the column {name} has a name that soft labels use for a column of their own "
                f"({', '.join(RESERVED)} and all that begin with {RESERVED_PREFIX}); rename it in the pool and in the labelled "
                "sets"
            )


def require_free_to_carry(carried: Iterable[str], read: Iterable[str], setting: str) -> None:
    """Refuse columns that a labelling job must not carry; estimates of how far to trust a label may be the user's own.

    A job without a validation set estimates nothing, so that `weight`, `alpha` and `candidates` are what a training takes them
    for, unless the teacher reads them, which makes them features.

    Args:
      carried: names of the columns that are copied beside the labels.
      read: names of the columns that the teacher reads.
      setting: what named them.

    Raises:
      ValueError: see `require_free_names`.
    """
    features = set(read)
    require_free_names([name for name in carried if name in features or name not in WEIGHTS], setting)
