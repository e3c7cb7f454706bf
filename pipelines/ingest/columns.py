"""What the values of a column are: counted per unit, added up, decided once for all files.

A column has the type that at least 95 % of its values have; a value that is of another type makes its record a bad one.
Where no type reaches that, the column is text. Numbers are int64, or float64 where there is a fraction among them; lists of
numbers of one shape are a vector.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.ingest.records import Values

MOSTLY = 0.95
MISSING = ("", "NA", "N/A", "n/a", "null", "NULL", "NaN", "nan", "None")  # text that stands for no value
# A whole number with leading zeros, or of more digits than every int64 holds, is text: a code that must stay as it is.
_PATTERNS = {
    "int": r"^[+-]?(0|[1-9]\d{0,17})$",
    "float": r"^[+-]?((0|[1-9]\d*)\.\d*|\.\d+|(0|[1-9]\d{0,17})[eE][+-]?\d{1,3}|inf|Infinity)([eE][+-]?\d{1,3})?$",
    "bool": r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$",
}
_CODE = r"^[+-]?(0\d|\d{19})"
_INTS = ((np.uint8, "uint8"), (np.int32, "int32"), (np.int64, "int64"))


@dataclass(frozen=True)
class ColumnType:
    """The type of a column.

    Attributes:
      kind: "int64", "float64", "bool", "string", "binary", "list" (of float32) or "vector".
      dtype: of a vector's numbers.
      shape: of a vector.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def describe(self) -> str:
        """Name the type for a reader."""
        return f"{self.dtype} {list(self.shape)}" if self.kind == "vector" else self.kind


@dataclass
class ColumnCounts:
    """Counts of the values of a column by kind; adding two gives the counts of both.

    Attributes:
      kinds: number of values that are "int", "float", "bool", "text", "bytes", "vector", "other".
      shapes: number of vectors of each shape.
      fractions: whether a vector holds fractions.
      low, high: bounds of the numbers of vectors without fractions.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    fractions: bool = False
    low: int = 0
    high: int = 0

    def add(self, values: Values) -> None:
        """Count values."""
        if isinstance(values, list):
            for value in values:
                self._add_value(value)
        else:
            self._add_text(values)

    def merge(self, other: ColumnCounts) -> None:
        """Add another part's counts."""
        self.kinds.update(other.kinds)
        self.shapes.update(other.shapes)
        self.fractions |= other.fractions
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def decide(self) -> ColumnType:
        """Return the type that fits; see the module."""
        kinds, total = self.kinds, sum(self.kinds.values())
        fits = {
            "float64" if kinds["float"] else "int64": kinds["int"] + kinds["float"],
            "bool": kinds["bool"],
            "binary": kinds["bytes"],
            "vector": kinds["vector"],
        }
        kind = next((kind for kind, count in fits.items() if total and count >= MOSTLY * total), None)
        if kind == "vector":
            return self.vector()
        return ColumnType(kind or ("binary" if kinds["bytes"] else "string"))

    def vector(self) -> ColumnType:
        """Return the vector type that fits, or a list type where shapes differ."""
        shape, count = max(self.shapes.items(), key=lambda item: (item[1], item[0]))
        if count < MOSTLY * self.shapes.total():
            return ColumnType("list")
        return ColumnType("vector", self.dtype(), shape)

    def dtype(self) -> str:
        """Return the narrowest of uint8, int32 and int64 that holds whole numbers; float32 where there are fractions."""
        if self.fractions:
            return "float32"
        return next(
            name for type_, name in _INTS if np.iinfo(type_).min <= self.low and self.high <= np.iinfo(type_).max
        )

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

    def _add_text(self, values: pa.Array) -> None:
        if (kind := _number_kind(values)) is not None:
            self.kinds[kind] += len(values)
            return
        values = values.filter(pc.invert(pc.is_in(values, pa.array(MISSING))))
        found = Counter({name: _matching(values, pattern) for name, pattern in _PATTERNS.items()})
        self.kinds.update({**found, "text": len(values) - found.total()})

    def _add_value(self, value: Any) -> None:
        kind = kind_of(value)
        if kind == "vector":
            self._add_vector(value)
        if kind:
            self.kinds[kind] += 1

    def _add_vector(self, value: np.ndarray[Any, Any]) -> None:
        self.shapes[value.shape] += 1
        if value.dtype.kind == "f":
            self.fractions = True
        else:
            self.low, self.high = min(self.low, int(value.min())), max(self.high, int(value.max()))


def _number_kind(values: pa.Array) -> str | None:
    """Tell fast whether all texts are whole numbers ("int") or numbers ("float"); None where one may be something else."""
    for kind, type_ in (("int", pa.int64()), ("float", pa.float64())):
        try:
            numbers = values.cast(type_)
        except pa.ArrowInvalid:
            continue
        return None if pc.any(pc.is_nan(numbers)).as_py() or _matching(values, _CODE) else kind
    return None


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
    types = {
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "binary": pa.binary(),
    }
    return pa.field(name, pa.list_(pa.float32()) if type_.kind == "list" else types[type_.kind])


def merge_counts(parts: Iterable[dict[str, ColumnCounts]]) -> dict[str, ColumnCounts]:
    """Add the counts of parts, columns in the order in which they are first met."""
    total: dict[str, ColumnCounts] = {}
    for part in parts:
        for name, counts in part.items():
            total.setdefault(name, ColumnCounts()).merge(counts)
    return total


def _matching(values: pa.Array, pattern: str) -> int:
    return int(pc.sum(pc.match_substring_regex(values, pattern)).as_py() or 0)


def _is_text(value: bytes) -> bool:
    try:
        return "\0" not in value.decode()
    except UnicodeDecodeError:
        return False
