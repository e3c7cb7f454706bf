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


def require_free_for_labelling(carried: Iterable[str], read: Iterable[str], id_column: str | None, carry: str) -> None:
    """Check the columns of a labelling job, which estimates nothing: `weight`, `alpha` and `candidates` may be the user's own.

    Carried beside the labels they are what a training takes them for: how far to trust a row. What the teacher reads is a
    feature and must not be taken for that.

    Args:
      carried: names of the columns that are copied beside the labels.
      read: names of the columns that the teacher reads.
      id_column: name of the column with the ids; `example_id` is what becomes of it.
      carry: the setting that names what is carried.

    Raises:
      ValueError: see `require_free_names`.
    """
    require_free_names(read, "teacher.input.columns")
    require_free_names([name for name in carried if name not in WEIGHTS], carry)
    if id_column not in (None, "example_id"):
        require_free_names((id_column,), "data.id")
