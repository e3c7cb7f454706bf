"""SQL for lists of numbers: their shapes, whether they fit a vector, their numbers."""

from __future__ import annotations

import duckdb
import numpy as np

from distilbeam.pipelines.ingest.columns import ColumnCounts, ColumnType
from distilbeam.pipelines.ingest.database import run, text

_FLOAT32 = 3.4028235677973366e38  # from here on a number is infinite as float32
_SQL = {"float32": "FLOAT", "uint8": "UTINYINT", "int32": "INTEGER", "int64": "BIGINT"}
_DEEPEST = 8  # axes of a vector
_FIELD = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|Infinity)"
_WHOLE_FIELD = r"[+-]?[0-9]+(\.0*)?"


def is_numeric_list(value: str) -> str:
    """Write the condition that the text of a JSON list holds no text, object, true, false or null, and is not too deep."""
    others = " AND ".join(f"NOT contains({value}, '{letter}')" for letter in '"{ul')
    return f"({others} AND {_depth(value)} <= {_DEEPEST})"


def count_vectors(counts: ColumnCounts, connection: duckdb.DuckDBPyConnection, column: str) -> None:
    """Add the lists of a column of JSON: vectors by their shape, and as "other" what is none or cannot be held."""
    lists = f"{column}[1] = '[' AND {is_numeric_list(column)}"
    depths = run(connection, f"SELECT DISTINCT {_depth(column)} AS depth FROM records WHERE {lists} ORDER BY depth")
    for (depth,) in depths:
        rows = run(
            connection,
            f"""SELECT CASE WHEN {_holds("x", "w", "fraction", "special", depth)} THEN {_shape("x", depth)} END AS shape,
            count(*), bool_or(fraction), min(list_min({_flat("w", depth)})), max(list_max({_flat("w", depth)}))
            FROM (SELECT {_parsed(column, "DOUBLE", depth)} AS x, {_is_fraction(column)} AS fraction,
            {_is_special(column)} AS special, CASE WHEN NOT fraction THEN {_parsed(column, "BIGINT", depth)} END AS w
            FROM records WHERE {lists} AND {_depth(column)} = {depth}) GROUP BY shape""",
        )
        for shape, number, fraction, low, high in rows:
            if shape is None:
                counts.kinds["other"] += number
            else:
                counts.add_vectors(tuple(map(int, shape.split(","))), number, fraction, low or 0, high or 0)


def vector_fits(value: str, type_: ColumnType) -> str:
    """Write the condition that a JSON list can be a vector, or a list of numbers."""
    depth = max(1, len(type_.shape))
    numbers, whole = (_parsed(value, kind, depth) for kind in ("DOUBLE", "BIGINT"))
    fits = f"{is_numeric_list(value)} AND {_depth(value)} = {depth}"
    if type_.dtype == "float32":
        holds = _holds(numbers, numbers, _is_fraction(value), _is_special(value), depth)
    else:
        flat, bounds = _flat(whole, depth), np.iinfo(type_.dtype)
        within = _within(flat, int(bounds.min), int(bounds.max))
        holds = f"NOT {_is_fraction(value)} AND list_count({flat}) = len({flat}) AND {within}"
    shape = f"{_shape(numbers, depth)} = '{','.join(map(str, type_.shape))}'" if type_.kind == "vector" else "true"
    return f"({fits} AND {holds} AND {shape})"


def vector_numbers(value: str, type_: ColumnType) -> str:
    """Write the numbers of a JSON list that fits, as float64 or int64."""
    return _parsed(value, "DOUBLE" if type_.dtype == "float32" else "BIGINT", max(1, len(type_.shape)))


def fields_fit(fields: list[str], dtype: str) -> str:
    """Write the condition that fields of CSV are all numbers that a vector can hold."""
    empty = "''"
    line = f"concat_ws(',', {', '.join(f'coalesce({field}, {empty})' for field in fields)})"
    number = f"({_FIELD})" if dtype == "float32" else _WHOLE_FIELD
    written = f"regexp_full_match({line}, {text(f'{number}(,{number})*')})"
    numbers = f"[{', '.join(f'TRY_CAST({field} AS {_SQL[dtype]})' for field in fields)}]"
    if dtype == "float32":
        held = f"({_within(numbers, -_FLOAT32, _FLOAT32)} OR contains(lower({line}), 'inf'))"
    else:
        held = f"len({numbers}) = list_count({numbers})"
    return f"CASE WHEN {written} THEN {held} ELSE false END"


def field_numbers(fields: list[str], dtype: str) -> str:
    """Write fields of CSV as a list of numbers; 0 for what is none."""
    return f"[{', '.join(f'coalesce(TRY_CAST({field} AS {_SQL[dtype]}), 0)' for field in fields)}]"


def _holds(real: str, whole: str, fraction: str, special: str, depth: int) -> str:
    """Write the condition that all is numbers: whole ones of int64, or finite as float32 unless something else is written."""
    reals, wholes = _flat(real, depth), _flat(whole, depth)
    finite = f"({special} OR {_within(reals, -_FLOAT32, _FLOAT32)})"
    return f"""CASE WHEN {fraction} THEN list_count({reals}) = len({reals}) AND {finite}
        ELSE list_count({wholes}) = len({wholes}) END"""


def _within(numbers: str, low: float, high: float) -> str:
    return f"coalesce(list_min({numbers}) >= {low!r} AND list_max({numbers}) <= {high!r}, true)"


def _shape(numbers: str, depth: int) -> str:
    """Write the shape of nested lists as text, such as 2,3; null where lists of one level differ in length."""
    if depth == 1:
        return f"len({numbers})::VARCHAR"
    item = f"a{depth}"
    inner = f"list_transform({numbers}, lambda {item}: {_shape(item, depth - 1)})"
    whole = f"len(list_distinct({inner})) = 1 AND list_count({inner}) = len({numbers})"
    return f"CASE WHEN {whole} THEN len({numbers}) || ',' || list_distinct({inner})[1] END"


def _flat(numbers: str, depth: int) -> str:
    return numbers if depth == 1 else f"flatten({_flat(numbers, depth - 1)})"


def _parsed(value: str, type_: str, depth: int) -> str:
    """Write the numbers of the text of a JSON list; null where something else is."""
    structure = "[" * depth + f'"{type_}"' + "]" * depth
    return f"from_json({value}, {text(structure)})"


def _depth(value: str) -> str:
    return f"CASE WHEN {value}[2] = '[' THEN length({value}) - length(ltrim({value}, '[')) ELSE 1 END"


def _is_fraction(value: str) -> str:
    return f"CASE WHEN contains({value}, '.') THEN true ELSE regexp_matches({value}, '[eEnN]') END"


def _is_special(value: str) -> str:
    return f"(contains({value}, 'n') OR contains({value}, 'N'))"
