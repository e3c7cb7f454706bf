"""What the values of a column are: counted per part, added up, decided once for all files.

A column has the type that at least 95 % of its values have; a value that is of another type makes its record a bad one.
Where no type reaches that, or where numbers would lose what is written, the column is text. Numbers are int64, or float64
where there is a fraction among them; lists of numbers of one shape are a vector. Whole numbers in lists of several lengths
are kept as lists of int64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

MOSTLY = 0.95
MISSING = ("", "NA", "N/A", "n/a", "null", "NULL", "NaN", "nan", "None")  # text that stands for no value
_INTS = ((np.uint8, "uint8"), (np.int32, "int32"), (np.int64, "int64"))


@dataclass(frozen=True)
class ColumnType:
    """The type of a column.

    Attributes:
      kind: "int64", "float64", "bool", "string", "binary", "list" or "vector".
      dtype: of a vector's or list's numbers.
      shape: of a vector.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def describe(self) -> str:
        """Name the type for a reader."""
        if self.kind == "list":
            return f"list of {self.dtype}"
        return f"{self.dtype} {list(self.shape)}" if self.kind == "vector" else self.kind


@dataclass
class ColumnCounts:
    """Counts of the values of a column by kind; adding two gives the counts of both.

    Attributes:
      kinds: number of values that are "int", "large" (whole numbers that float64 would round), "float", "overflow" (larger
        than float64), "infinite" (written so), "bool", "code" (text that begins as a number), "text", "bytes", "vector",
        "other".
      shapes: number of vectors of each shape.
      fractions: whether a vector holds fractions.
      low, high: bounds of the numbers of vectors without fractions.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    fractions: bool = False
    low: int = 0
    high: int = 0

    def add(self, values: Sequence[Any]) -> None:
        """Count values."""
        for value in values:
            kind = kind_of(value)
            if kind == "vector":
                fraction = value.dtype.kind == "f"
                bounds = (int(value.min()), int(value.max())) if value.size and not fraction else (0, 0)
                self.add_vectors(value.shape, 1, fraction, *bounds)
            elif kind:
                self.kinds[kind] += 1

    def add_vectors(self, shape: tuple[int, ...], count: int, fractions: bool, low: int, high: int) -> None:
        """Count vectors of one shape."""
        self.kinds["vector"] += count
        self.shapes[shape] += count
        self.fractions |= fractions
        self.low, self.high = min(self.low, low), max(self.high, high)

    def merge(self, other: ColumnCounts) -> None:
        """Add another part's counts."""
        self.kinds.update(other.kinds)
        self.shapes.update(other.shapes)
        self.fractions |= other.fractions
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def decide(self, *, single: bool = False) -> ColumnType:
        """Return the type that fits; see the module.

        Args:
          single: whether a column of vectors of one number is a column of numbers, as in tf.Example.
        """
        kinds, total = self.kinds, self.kinds.total()
        number = self._number()
        fits = {
            number: sum(kinds[kind] for kind in ("int", "large", "float", "overflow", "infinite")),
            "bool": kinds["bool"],
            "binary": kinds["bytes"],
            "vector": kinds["vector"],
        }
        kind = next((kind for kind, count in fits.items() if kind and total and count >= MOSTLY * total), None)
        if kind == "vector":
            return self._vector(single)
        return ColumnType(kind or ("binary" if kinds["bytes"] else "string"))

    def all_fit(self, type_: ColumnType) -> bool:
        """Whether every value fits a type for which they were counted; for a type of the user's, False."""
        kinds, total = self.kinds, self.kinds.total()
        if type_.kind == "vector":
            return kinds["vector"] == total and len(self.shapes) <= 1
        if type_.kind == "list":
            return kinds["vector"] == total and all(len(shape) == 1 for shape in self.shapes)
        fitting = {
            "int64": ("int", "large"),
            "float64": ("int", "float", "infinite"),
            "bool": ("bool",),
        }.get(type_.kind, tuple(kinds))
        return sum(kinds[kind] for kind in fitting) == total

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        shapes = [[list(shape), count] for shape, count in sorted(self.shapes.items())]
        return {
            "kinds": dict(self.kinds),
            "shapes": shapes,
            "fractions": self.fractions,
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ColumnCounts:
        """Rebuild counts from `to_json`'s values."""
        shapes = Counter({tuple(shape): count for shape, count in data["shapes"]})
        return cls(Counter(data["kinds"]), shapes, data["fractions"], data["low"], data["high"])

    def _number(self) -> str | None:
        """Return the type that holds all numbers as they are written, or None."""
        kinds = self.kinds
        fractions = kinds["float"] + kinds["overflow"] + kinds["infinite"]
        if kinds["code"] or (kinds["large"] and fractions) or not kinds["int"] + kinds["large"] + kinds["float"]:
            return None
        return "float64" if fractions else "int64"

    def _vector(self, single: bool) -> ColumnType:
        """Return the vector type that fits, or a list type where shapes differ."""
        shapes = Counter({shape: count for shape, count in self.shapes.items() if shape != (0,)})
        if not shapes:
            return ColumnType("list", "int64")
        shape, count = max(shapes.items(), key=lambda item: (item[1], item[0]))
        flat = all(len(each) == 1 for each in shapes)
        # A few of another length are damage among vectors of fractions, but a sequence among whole numbers.
        mostly = count == shapes.total() if flat and not self.fractions else count >= MOSTLY * self.shapes.total()
        if single and shape == (1,) and mostly:
            return ColumnType("float64" if self.fractions else "int64")
        if mostly and (self.fractions or count == self.shapes.total() or not flat):
            return ColumnType("vector", self._dtype(), shape)
        return ColumnType("list", "float32" if self.fractions else "int64") if flat else ColumnType("string")

    def _dtype(self) -> str:
        """Return the narrowest of uint8, int32 and int64 that holds whole numbers; float32 where there are fractions."""
        if self.fractions:
            return "float32"
        return next(
            name for type_, name in _INTS if np.iinfo(type_).min <= self.low and self.high <= np.iinfo(type_).max
        )


def kind_of(value: Any) -> str:
    """Name the kind of a Python value; "" for a missing one."""
    match value:
        case None:
            return ""
        case bool():
            return "bool"
        case int():
            return "int" if -(2**63) <= value < 2**63 else "other"
        case float():
            return "" if math.isnan(value) else "float"
        case str():
            return "text"
        case bytes():
            return "text" if _is_text(value) else "bytes"
        case np.ndarray():
            return "vector"
        case _:
            return "other"


def arrow_field(name: str, type_: ColumnType) -> pa.Field:
    """Return the field of a pool's schema for a column."""
    if type_.kind == "vector":
        width = math.prod(type_.shape) * np.dtype(type_.dtype).itemsize
        return pa.field(name, pa.binary(width), metadata={"dtype": type_.dtype, "shape": str(list(type_.shape))})
    if type_.kind == "list":
        return pa.field(name, pa.list_(pa.from_numpy_dtype(np.dtype(type_.dtype))))
    types = {
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "binary": pa.binary(),
    }
    return pa.field(name, types[type_.kind])


def merge_counts(parts: Iterable[dict[str, ColumnCounts]]) -> dict[str, ColumnCounts]:
    """Add the counts of parts, columns in the order in which they are first met."""
    total: dict[str, ColumnCounts] = {}
    for part in parts:
        for name, counts in part.items():
            total.setdefault(name, ColumnCounts()).merge(counts)
    return total


def _is_text(value: bytes) -> bool:
    try:
        return "\0" not in value.decode()
    except UnicodeDecodeError:
        return False
