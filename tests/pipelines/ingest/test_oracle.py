"""CSV and JSON lines against Python's own readers, on files that chance wrote."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.ingest.ingesting import ingest
from distilbeam.pipelines.ingest.settings import ingest_options

_FIELDS = [
    "a",
    "b c",
    " d",
    "é",
    "x,y",
    'say "no"',
    "p\nq",
    "r\r\ns",
    "0x10",
    "01",
    "1.0",
    "NULL",
    "NaN",
    "'",
    "\\",
    "\t",
    '"',
]
_NAMES = ["a", "b", "_file", "a.b", "x/y", "A", "é", "with space", "'q\"", "~t"]
_BROKEN = ['{"a":', "[1,2]", "5", '{"a":"\\ud800"}', '{"a":1,"a":2}', "nonsense", "{}", '{"a":01}']


def ingested(folder: Path, data: bytes, **settings: Any) -> tuple[pa.Table | None, list[int]]:
    """Ingest a source; return the pool, or None where no record can be used, and the lines of the dead letters."""
    folder.mkdir()
    (folder / "source").write_bytes(data)
    try:
        ingest([str(folder / "source")], folder / "pool", ingest_options(**settings))
    except ValueError as e:
        if "no record can be used" in str(e) or "must hold at least one record" in str(e):
            return None, []
        raise
    letters = folder / "pool" / "_dead_letters.jsonl"
    lines = [json.loads(line)["line"] for line in letters.read_text().splitlines()] if letters.exists() else []
    return pa.concat_tables(pq.read_table(file) for file in sorted((folder / "pool").glob("*.parquet"))), lines


def written(field: str, chance: random.Random) -> str:
    """Write a field of CSV, now and then as nobody should."""
    fate = chance.random()
    if fate < 0.03:
        return field
    if fate < 0.05:
        return chance.choice([" ", "   ", "\t"]) + f'"{field}"'
    if fate < 0.06:
        return f'"{field}"' + chance.choice([" ", "   ", "\t"])
    if fate < 0.07:
        return f'"{field}'
    quoted = field.replace('"', '""')
    return f'"{quoted}"' if quoted != field or set(field) & set(",\r\n") or fate < 0.3 else field


def csv_file(chance: random.Random, width: int) -> bytes:
    end = chance.choice(["\n", "\n", "\r\n"])
    lines = [",".join("abc"[:width])]
    for _ in range(chance.randrange(1, 30)):
        count = width if chance.random() < 0.93 else chance.randrange(1, 5)
        lines.append(
            ",".join(written(chance.choice([*_FIELDS, "", "", str(chance.randrange(9))]), chance) for _ in range(count))
        )
        lines += [""] * (chance.random() < 0.05)
    data = end.join(lines) + chance.choice([end, ""])
    return (data.replace("\r\n", "\n", 1) if chance.random() < 0.05 else data).encode()


def csv_by_python(data: bytes, width: int) -> tuple[list[list[str]], list[int]]:
    """Read records one by one with Python's strict reader; one that is not CSV costs its first line."""
    lines = [line + "\n" for line in data.decode().split("\n")]
    lines[-1] = lines[-1][:-1]
    rows, bad, at = [], [], 1
    while at < len(lines):
        reader = csv.reader(lines[at:], strict=True)
        try:
            fields = next(reader, [])
        except csv.Error:
            bad.append(at + 1)
            at += 1
            continue
        if len(fields) >= width and not any(fields[width:]) and (width > 1 or any(fields)):
            rows.append(fields[:width])
        elif fields and (width > 1 or any(fields)):
            bad.append(at + 1)
        at += max(1, reader.line_num)
    return rows, bad


@pytest.mark.parametrize("seed", range(6))
def test_csv_is_read_as_python_reads_it(tmp_path: Path, seed: int) -> None:
    chance, compared = random.Random(seed), 0
    for number in range(8):
        width = chance.randrange(1, 4)
        data = csv_file(chance, width)
        types = dict.fromkeys("abc"[:width], "string")
        pool, bad = ingested(tmp_path / str(number), data, format="csv", types=types)
        rows, expected_bad = csv_by_python(data, width)
        expected = [[field or None for field in row] for row in dict.fromkeys(map(tuple, rows))]
        if pool is None:
            assert expected == [], data
            continue
        assert [list(row.values())[1:] for row in pool.to_pylist()] == expected, data
        assert bad == expected_bad, data
        compared += 1
    assert compared >= 4


def value(chance: random.Random, depth: int = 0) -> Any:
    scalars = [
        0,
        1,
        2**53 + 1,
        2**63 - 1,
        2**64,
        10**30,
        0.5,
        1.0,
        -0.0,
        1e300,
        "",
        "a",
        "01",
        "1",
        "null",
        "😀",
        "a\0b",
        True,
        None,
    ]
    if depth < 2 and chance.random() < 0.4:
        if chance.random() < 0.5:
            return [chance.choice([1, 2, 300, 2**40, -1]) for _ in range(chance.randrange(4))]
        items = [value(chance, depth + 1) for _ in range(chance.randrange(3))]
        return items if chance.random() < 0.5 else {"p": items}
    return chance.choice(scalars)


def of_one_kind(chance: random.Random) -> Any:
    """Choose how the values of a column are made."""
    return chance.choice(
        [
            lambda: chance.randrange(100),
            chance.random,
            lambda: [chance.randrange(9) for _ in range(chance.randrange(4))],
            lambda: [chance.random(), 0.5, 1.0],
            lambda: [[1, 2], [3, chance.randrange(9)]],
            lambda: chance.choice(["u", "v"]),
            lambda: chance.random() < 0.5,
        ]
    )


def agrees(found: Any, expected: Any, field: pa.Field) -> bool:
    """Tell whether a value of the pool is that of the line; text stands for what is no text as JSON."""
    metadata = field.metadata or {}
    if expected is None or found is None:
        return expected is None and found is None
    if b"dtype" in metadata:
        return bool(found == np.array(expected, metadata[b"dtype"].decode()).tobytes())
    if pa.types.is_list(field.type):
        return bool(found == np.array(expected, field.type.value_type.to_pandas_dtype()).tolist())
    if pa.types.is_string(field.type):
        return bool(found == expected if isinstance(expected, str) else json.loads(found) == expected)
    return bool(found == expected) and isinstance(found, bool) == isinstance(expected, bool)


@pytest.mark.parametrize("seed", range(6))
def test_json_lines_are_read_as_python_reads_them(tmp_path: Path, seed: int) -> None:
    chance, compared = random.Random(seed), 0
    for number in range(8):
        names = chance.sample(_NAMES, chance.randrange(1, 5))
        makers = {name: of_one_kind(chance) if number % 2 else (lambda: value(chance)) for name in names}
        lines: list[str] = []
        records: dict[str, tuple[int, dict[str, Any]]] = {}
        broken: list[int] = []
        for line in range(1, chance.randrange(2, 25)):
            fate = chance.random()
            if fate < 0.1:
                lines.append(chance.choice(_BROKEN) if fate < 0.05 else "")
                broken += [line] * (fate < 0.05)
                continue
            record = {name: makers[name]() for name in names if chance.random() < 0.9} or {names[0]: 1}
            lines.append(json.dumps(record, ensure_ascii=chance.random() < 0.5))
            records.setdefault(json.dumps(record, sort_keys=True), (line, record))
        pool, bad = ingested(tmp_path / str(number), "\n".join(lines).encode(), format="jsonl")
        if pool is None:
            assert not records, lines
            continue
        assert set(broken) <= set(bad), lines
        kept = [record for line, record in records.values() if line not in bad]
        assert len(bad) - len(broken) <= 0.05 * len(records) * len(names), lines
        for row, record in zip(pool.to_pylist(), kept, strict=True):
            for field in pool.schema.remove(pool.schema.get_field_index("id")):
                assert agrees(row[field.name], record.get(field.name), field), (field, record, row)
        compared += 1
    assert compared >= 4
