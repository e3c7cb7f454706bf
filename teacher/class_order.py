"""The order of a model's outputs, by the names of its classes, and the order that the job wants.

Classes are matched by name: exactly, or without regard to capitals, spaces, '-' and '_'. Numerals 0 .. C - 1 are
positions. Where neither side can be read so, nothing is guessed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

_log = logging.getLogger(__name__)


def class_order(own: Sequence[str], wanted: Sequence[str], whose: str) -> list[int] | None:
    """Find the output of each wanted class.

    Args:
      own: names of the model's outputs, in their order; names such as LABEL_0 say nothing.
      wanted: names of the job's classes, in their order.
      whose: where the model's names come from, for the messages.

    Returns:
      For each wanted class the position of its output; None where they stand in this order already.

    Raises:
      ValueError: the names or their number differ.

    Example:
      >>> class_order(["positive", "negative"], ["negative", "positive"], "config.json (id2label)")
      [1, 0]
    """
    if len(own) != len(wanted):
        raise ValueError(
            f"the teacher has {len(own):,} outputs ({_listed(own)}, from {whose}), the job {len(wanted):,} classes "
            f"({_listed(wanted)}); correct data.classes or data.num_classes, or choose another model"
        )
    for form in (str, _plain):
        places = {form(name): place for place, name in enumerate(own)}
        if len(places) == len(own) and {form(name) for name in wanted} == set(places):
            return _unless_sorted([places[form(name)] for name in wanted])
    if _says_nothing(own):
        _log.warning("the teacher's outputs have no names (%s); they are taken in the order of data.classes", whose)
        return None
    if _are_positions(wanted):
        return _unless_sorted([int(name) for name in wanted])
    raise ValueError(
        f"the teacher's outputs are {_listed(own)} ({whose}), the job's classes {_listed(wanted)}: which is which cannot be "
        "known; use the teacher's names in data.classes and the labelled sets, or name its outputs in their order by the "
        "job's names in teacher.classes"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _says_nothing(names: Sequence[str]) -> bool:
    return all(name == f"LABEL_{place}" for place, name in enumerate(names)) or list(names) == [
        str(place) for place in range(len(names))
    ]


def _are_positions(names: Sequence[str]) -> bool:
    return {*names} == {str(place) for place in range(len(names))}


def _unless_sorted(order: list[int]) -> list[int] | None:
    return None if order == sorted(order) else order


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names)
