"""The protocol of a teacher: a fingerprint, and logits for a batch of rows."""

from __future__ import annotations

from typing import NoReturn, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@runtime_checkable
class Teacher(Protocol):
    """A model that is asked for labels.

    Teachers hold files, threads and connections: they are made where they are used, closed afterwards, and never
    pickled. What travels is their configuration.
    """

    def fingerprint(self) -> str:
        """Identify the answers.

        Returns:
          Text that changes whenever the answers can change. Cheap to call again: files are read again only when they
          changed.

        Raises:
          TeacherChanged: the teacher is no longer the one that was loaded.
        """
        ...

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch.

        Args:
          batch: n rows with the columns that the teacher reads.

        Returns:
          float32 [n, C].

        Raises:
          TeacherUnavailable: no answer could be had, whatever the rows.
          TeacherChanged: the teacher is no longer the one that was loaded.
          TeacherMisfit: its answers are not what the configuration says, whatever the rows.
          Exception: these rows cannot be answered; fewer of them may be.
        """
        ...

    def close(self) -> None:
        """Give back files, threads and connections; a second call does nothing."""
        ...


class NotPickled:
    """Refuses to be pickled, before something half alive arrives at a worker."""

    def __reduce__(self) -> NoReturn:
        """Refuse.

        Raises:
          TypeError: always.
        """
        raise TypeError("teachers are not pickled; send the configuration and load the teacher where it is used")


class TeacherChanged(RuntimeError):  # noqa: N818  (named after what happened, like ConnectionRefused)
    """The teacher is not the one whose labels are being written."""


class TeacherUnavailable(RuntimeError):  # noqa: N818
    """The teacher cannot be reached or refuses every request; no row is to blame."""


class TeacherMisfit(ValueError):  # noqa: N818
    """The teacher's answers are not what the configuration says: another number of classes, or numbers of another kind.

    No row is to blame and no repetition helps: whoever catches errors of single rows lets this one pass.
    """
