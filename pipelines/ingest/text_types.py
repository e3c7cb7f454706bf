"""The types of columns of text: what the values of a column are, counted over all records, and SQL that converts them.

`columns.ColumnCounts.decide` decides. A value that does not fit its column's type makes its record a bad one; a column is
text, in which everything fits, where numbers would lose what is written: with codes among them (leading zeros, 0x10, 1,000,
dates, more digits than int64 holds), or with whole numbers beyond 2^53 beside fractions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from distilbeam.pipelines.ingest.columns import MISSING, ColumnCounts, ColumnType
from distilbeam.pipelines.ingest.database import run, text
from distilbeam.pipelines.ingest.records_table import RecordsTable
from distilbeam.pipelines.ingest.vectors import count_vectors, is_numeric_list, vector_fits, vector_numbers

_PLAIN = r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?"  # most numbers: float64 holds them, and one look tells
_WHOLE = "[+-]?(0|[1-9][0-9]*)"
_FRACTION = r"[+-]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(0|[1-9][0-9]*)[eE][+-]?[0-9]+"
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
INFINITE = "[+-]?(inf|Infinity)"
_CODE = r"[+-]?\.?[0-9].*"
_BOOLEANS = ("true", "True", "TRUE", "false", "False", "FALSE")
_EXACT = 2**53  # float64 holds every whole number up to here
_TYPES = {"int64": "BIGINT", "float64": "DOUBLE"}


class CsvTypes:
    """Fields of CSV: an empty one is missing, and in a column of numbers or booleans a word that says so."""

    def missing(self, value: str) -> str:
        """Write the condition that a value says that there is none."""
        return f"({value} IS NULL OR {_is_one_of(value, MISSING)})"

    def kind(self, value: str) -> str:
        """Write the kind of a value, one of `ColumnCounts.kinds`; null where it is missing."""
        return f"""CASE WHEN {value} IS NULL THEN NULL WHEN contains('NnIiTtFf', {value}[1]) THEN
            CASE WHEN {_is_one_of(value, MISSING)} THEN NULL WHEN {_is_one_of(value, _BOOLEANS)} THEN 'bool'
            WHEN {_is_one_of(value, ("inf", "Infinity"))} THEN 'infinite' ELSE 'text' END
            WHEN contains('+-.0123456789', {value}[1]) THEN CASE {_number_kind(value)}
            WHEN regexp_full_match({value}, {text(_CODE)}, 's') THEN 'code' ELSE 'text' END ELSE 'text' END"""

    def fits(self, value: str, type_: ColumnType) -> str:
        """Write the condition that a value is missing or can be a type."""
        if type_.kind in ("string", "binary"):
            return "true"
        fits = (
            _is_one_of(f"lower({value})", ("true", "false"))
            if type_.kind == "bool"
            else _fits_number(value, type_.kind)
        )
        return f"({self.missing(value)} OR {fits})"

    def converted(self, value: str, type_: ColumnType) -> str:
        """Write a value that fits as a type."""
        match type_.kind:
            case "string":
                return value
            case "binary":
                return f"encode({value})"
            case "bool":
                return f"CASE lower({value}) WHEN 'true' THEN true WHEN 'false' THEN false END"
            case "int64":
                return f"TRY_CAST({value} AS BIGINT)"
            case _:  # of the words for a missing value NaN alone is a number
                return f"nullif(TRY_CAST({value} AS DOUBLE), 'nan'::DOUBLE)"


class JsonTypes:
    """Values of JSON as their text: a list of numbers is a vector, other lists and objects stay text."""

    def missing(self, value: str) -> str:
        """See `CsvTypes`."""
        return f"""CASE WHEN {value} IS NULL THEN true WHEN contains('-nN', {value}[1])
            THEN {value} = 'null' OR regexp_full_match({value}, '-?[nN][aA][nN]') ELSE false END"""

    def kind(self, value: str) -> str:
        """See `CsvTypes`."""
        return f"""CASE WHEN {value} IS NULL THEN NULL
            WHEN {value}[1] = '"' THEN CASE WHEN contains('+-.0123456789', {value}[2])
            AND regexp_full_match({value}, {text(f'"{_CODE}"')}) THEN 'code' ELSE 'text' END
            WHEN {value}[1] = '[' THEN CASE WHEN {is_numeric_list(value)} THEN 'vector' ELSE 'other' END
            WHEN {value}[1] = '{{' THEN 'other' WHEN {self.missing(value)} THEN NULL
            WHEN {_is_one_of(value, ("true", "false"))} THEN 'bool' {_number_kind(value)}
            WHEN regexp_full_match(lower({value}), '-?inf(inity)?') THEN 'infinite' ELSE 'other' END"""

    def fits(self, value: str, type_: ColumnType) -> str:
        """See `CsvTypes`."""
        if type_.kind == "string":
            return "true"
        if type_.kind == "binary":
            fits = f"{value}[1] = '\"'"
        elif type_.kind == "bool":
            fits = _is_one_of(value, ("true", "false"))
        elif type_.kind in ("vector", "list"):
            fits = vector_fits(value, type_)
        else:
            fits = _fits_number(value, type_.kind)
        return f"({self.missing(value)} OR coalesce({fits}, false))"

    def converted(self, value: str, type_: ColumnType) -> str:
        """See `CsvTypes`; a vector is a list of numbers, nested where it has several axes."""
        string = f"CASE WHEN {value}[1] = '\"' THEN json_extract_string({value}, '$') ELSE {value} END"
        if type_.kind in ("string", "binary"):
            word = string if type_.kind == "string" else f"encode({string})"
        elif type_.kind == "bool":
            word = f"{value} = 'true'"
        elif type_.kind in ("vector", "list"):
            word = vector_numbers(value, type_)
        else:
            word = f"TRY_CAST({value} AS {_TYPES[type_.kind]})"
        return f"CASE WHEN NOT {self.missing(value)} THEN {word} END"


TextTypes: TypeAlias = CsvTypes | JsonTypes


def count_kinds(table: RecordsTable, types: TextTypes, name: str) -> ColumnCounts:
    """Count the values of a column by kind."""
    column = table.column(name)
    rows = run(table.connection, f"SELECT {types.kind(column)} AS kind, count(*) FROM records GROUP BY kind")
    counts = ColumnCounts()
    counts.kinds.update({kind: number for kind, number in rows if kind is not None})
    if counts.kinds.pop("vector", 0):
        count_vectors(counts, table.connection, column)
    return counts


def shown(value: str | None, types: TextTypes) -> str:
    """Write a value for the reader of an error."""
    if value is None or not isinstance(types, JsonTypes):
        return repr(value)[:80]
    try:
        data = json.loads(value)
    except ValueError:
        return value[:80]
    shape = _shape(data)
    return repr(data)[:80] if shape is None else f"shape {shape}"


def _is_one_of(value: str, words: Sequence[str]) -> str:
    """Write the condition that a value is one of some words; DuckDB makes a join of IN, which loses the rows' order."""
    return f"({' OR '.join(f'{value} = {text(word)}' for word in words)})"


def _number_kind(value: str) -> str:
    """Write the cases of a number that is no code."""
    whole, real = f"TRY_CAST({value} AS BIGINT)", f"TRY_CAST({value} AS DOUBLE)"
    return f"""WHEN regexp_full_match({value}, {text(_PLAIN)}) THEN CASE WHEN contains({value}, '.') THEN 'float' ELSE 'int' END
        WHEN regexp_full_match({value}, {text(_WHOLE)}) THEN
        CASE WHEN {whole} IS NULL THEN 'code' WHEN {whole} BETWEEN -{_EXACT} AND {_EXACT} THEN 'int' ELSE 'large' END
        WHEN regexp_full_match({value}, {text(_FRACTION)}) THEN CASE WHEN isfinite({real}) THEN 'float' ELSE 'overflow' END
        WHEN regexp_full_match({value}, {text(INFINITE)}) THEN 'infinite'"""


def _fits_number(value: str, kind: str) -> str:
    if kind == "int64":
        return f"(regexp_full_match({value}, '[+-]?[0-9]+') AND TRY_CAST({value} AS BIGINT) IS NOT NULL)"
    finite = f"(regexp_full_match({value}, {text(NUMBER)}) AND isfinite(TRY_CAST({value} AS DOUBLE)))"
    return f"({finite} OR regexp_full_match({value}, {text(INFINITE)}))"


def _shape(data: Any) -> list[int] | None:
    """Return the shape of a list of numbers, or of lists of them; None for anything else."""
    if not isinstance(data, list):
        return None
    if all(isinstance(item, int | float) and not isinstance(item, bool) for item in data):
        return [len(data)]
    shapes = [_shape(item) for item in data]
    return [len(data), *shapes[0]] if shapes[0] is not None and shapes.count(shapes[0]) == len(shapes) else None
