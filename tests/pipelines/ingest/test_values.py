"""Values survive an ingest: nothing is rounded, converted or dropped in silence, and one bad record costs itself alone."""

from __future__ import annotations

import gzip
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import example, write_tfrecords
from typer.testing import CliRunner

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.ingest import database, lines_table, tfrecord
from distilbeam.pipelines.ingest.ingesting import Summary, ingest
from distilbeam.pipelines.ingest.settings import ingest_options


def run(
    tmp_path: Path, data: bytes | str, name: str, **settings: Any
) -> tuple[Summary, pa.Table, list[dict[str, Any]]]:
    """Write a source and ingest it; return the summary, the pool and the dead letters."""
    source = tmp_path / name
    source.write_bytes(data if isinstance(data, bytes) else data.encode())
    format_ = next(f for f in ("csv", "jsonl", "tfrecord", "txt") if f".{f}" in name)
    out = tmp_path / f"{name}.pool"
    options = ingest_options(**{"format": "text" if format_ == "txt" else format_, **settings})
    summary = ingest([str(source)], out, options)
    letters = out / "_dead_letters.jsonl"
    bad = [json.loads(line) for line in letters.read_text().splitlines()] if letters.exists() else []
    return summary, pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("*.parquet"))), bad


def lines_of(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        (["16", "0x10", "7"], "string", ["16", "0x10", "7"]),
        (["1", "01", "1"], "string", ["1", "01"]),
        (["1", "1.0", "1"], "double", [1.0, 1.0]),
        (["1_000", "1000"], "string", ["1_000", "1000"]),
        (["1,000", "5"], "string", ["1,000", "5"]),
        ([" 1", "1"], "string", [" 1", "1"]),
        (["9007199254740993", "0.5"], "string", ["9007199254740993", "0.5"]),
        (["9007199254740993", "5"], "int64", [9007199254740993, 5]),
        (["9223372036854775808", "5"], "string", ["9223372036854775808", "5"]),
        (["-9223372036854775808", "+5"], "int64", [-(2**63), 5]),
        (["NULL", "", "5"], "int64", [None, None, 5]),
        (["NULL", "", "word"], "string", ["NULL", None, "word"]),
        (["NaN", "nan", "2.5"], "double", [None, None, 2.5]),
        (["inf", "-inf", "2"], "double", [math.inf, -math.inf, 2.0]),
        (["true", "FALSE", ""], "bool", [True, False, None]),
        (["2020-01-31", "12:30"], "string", ["2020-01-31", "12:30"]),
        (["1e5", "100000.0"], "double", [100000.0, 100000.0]),
    ],
)
def test_csv_values(tmp_path: Path, values: list[str], type_: str, expected: list[Any]) -> None:
    _, pool, bad = run(tmp_path, "v\n" + "".join(f'"{value}"\n' if value else '"",\n' for value in values), "a.csv")
    if "" in values:  # one column that is empty is a blank line
        rows = "".join(f'{i},"{value}"\n' for i, value in enumerate(values))
        _, pool, bad = run(tmp_path, "i,v\n" + rows, "b.csv")
    assert bad == []
    assert str(pool.schema.field("v").type) == type_
    assert pool["v"].to_pylist() == expected
    assert len(set(pool["id"].to_pylist())) == len(expected)


@pytest.mark.parametrize(
    ("values", "type_", "expected"),
    [
        ([1, 1.0, 1], "double", [1.0, 1.0]),
        ([1, "1"], "string", ["1", "1"]),
        ([5, "01"], "string", ["5", "01"]),
        ([2**53 + 1, 0.5], "string", ["9007199254740993", "0.5"]),
        ([2**53 + 1, 1], "int64", [2**53 + 1, 1]),
        ([10**30, 1], "string", [str(10**30), "1"]),
        ([None, "null", ""], "string", [None, "null", ""]),
        ([True, False], "bool", [True, False]),
        ([[1, 2], [3], [], [4, 5, 6]], "list<element: int64>", [[1, 2], [3], [], [4, 5, 6]]),
        ([[2**53 + 1], []], "list<element: int64>", [[2**53 + 1], []]),
        ([[], []], "list<element: int64>", [[]]),
        ([[0.5], [], [1.0, 2.0]], "list<element: float>", [[0.5], [], [1.0, 2.0]]),
        ([["a"], {"b": [1, None]}], "string", ['["a"]', '{"b":[1,null]}']),
        ([[2**64], [1]], "string", ["[18446744073709551616]", "[1]"]),
        ([[[1, 2], 3]], "string", ["[[1,2],3]"]),
    ],
)
def test_json_values(tmp_path: Path, values: list[Any], type_: str, expected: list[Any]) -> None:
    _, pool, bad = run(tmp_path, lines_of([{"v": value} for value in values]), "a.jsonl")
    assert bad == []
    assert str(pool.schema.field("v").type) == type_
    assert pool["v"].to_pylist() == expected
    assert len(set(pool["id"].to_pylist())) == len(expected)


def test_what_overflows_is_a_bad_record(tmp_path: Path) -> None:
    _, pool, bad = run(tmp_path, "n\n" + "".join(f"{i}.5\n" for i in range(30)) + "1e400\n", "a.csv")
    assert [(b["line"], b["error"]) for b in bad] == [(32, "column n must be float64, got '1e400'")]
    records = [{"v": [i + 0.5, 1.0]} for i in range(60)]
    _, pool, bad = run(tmp_path, lines_of([*records, {"v": [1e39, 1.0]}]) + '{"v": [1e400, 2]}\n', "a.jsonl")
    assert [b["line"] for b in bad] == [61, 62]
    assert pool.schema.field("v").metadata == {b"dtype": b"float32", b"shape": b"[2]"}
    assert pool.num_rows == 60


def test_token_ids_lead_to_tokens(tmp_path: Path) -> None:
    ids = [[7], [], [1, 2, 3], [4, 5]]
    _, pool, _ = run(tmp_path, lines_of([{"ids": each} for each in ids]), "a.jsonl")
    tokens = InputConfig(kind="tokens", columns=("ids",), vocabulary=10, max_length=3)
    read = make_input(tokens)(pool.combine_chunks().to_batches()[0])
    np.testing.assert_array_equal(np.asarray(read)[:, 0] > 0, [True, False, True, True])
    records = [example({"ids": each or [1]}) for each in ids]
    write_tfrecords(tmp_path / "b.tfrecord", records)
    _, pool, bad = run(tmp_path, (tmp_path / "b.tfrecord").read_bytes(), "b.tfrecord")
    assert pool["ids"].to_pylist() == [[7], [1], [1, 2, 3], [4, 5]]
    assert bad == []


def test_a_rare_list_field_costs_no_other_row(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"n": i} for i in range(50)]
    records[7]["box"] = [1, 2, 3, 4]
    _, pool, bad = run(tmp_path, lines_of(records), "a.jsonl")
    assert (pool.num_rows, bad) == (50, [])
    boxes = pool["box"].to_pylist()
    assert boxes[7] == bytes([1, 2, 3, 4])
    assert boxes.count(None) == 49


def test_fields_that_turn_up_late_are_columns_of_all(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"n": i} for i in range(2500)]
    records[1500] = {"late": "x", "n": 1500}
    records[2000] = {"n": 2000, "later": [1], "late": None}
    lines = lines_of(records).splitlines()
    lines[2100] = '{"n": 1, "only here": 1, "only here": 2}'
    _, pool, bad = run(tmp_path, "\n".join(lines), "a.jsonl")
    assert pool.schema.names == ["id", "n", "late", "later"], (
        "in the order in which they are met; what is refused adds none"
    )
    assert [(b["line"], b["error"]) for b in bad] == [
        (2101, "a line must have every field once, got 'only here' twice")
    ]
    assert pool["n"].to_pylist() == [i for i in range(2500) if i != 2100]
    assert [value for value in pool["late"].to_pylist() if value is not None] == ["x"]


def test_known_fields_do_not_count_twice_towards_the_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_table, "MOST_FIELDS", 5)
    record = dict.fromkeys("abcd", 1)
    _, pool, _ = run(tmp_path, lines_of([record] * 1200 + [{**record, "e": 1}]), "a.jsonl")
    assert pool.schema.names == ["id", *"abcde"]
    with pytest.raises(ValueError, match="the lines have more than 5 different fields, the last 'f'; a pool's columns"):
        run(tmp_path, lines_of([record, {**record, "e": 1, "f": 1}]), "b.jsonl")


def test_names_may_be_any(tmp_path: Path) -> None:
    names = [
        "_file",
        "_key",
        "c0",
        "number",
        "file",
        "line",
        "a b",
        "A B",
        "it's",
        'x"y',
        "p/q",
        "t~0",
        "[red]",
        "é",
        "rowid",
    ]
    record = dict.fromkeys(names, 1)
    _, pool, bad = run(tmp_path, lines_of([record, {**record, "c0": 2}]), "a.jsonl")
    assert bad == []
    assert pool.drop_columns(["id"]).to_pylist() == [record, {**record, "c0": 2}]
    header = ",".join('"' + name.replace('"', '""') + '"' for name in names)
    _, pool, _ = run(tmp_path, f"{header}\n{','.join(map(str, range(len(names))))}\n", "a.csv")
    assert pool.drop_columns(["id"]).to_pylist() == [dict(zip(names, range(len(names)), strict=True))]


def test_more_columns_than_an_expression_has_terms(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(1500)]
    rows = [[str(1500 * i + j) for j in range(1500)] for i in range(3)]
    text = "\n".join(",".join(fields) for fields in [names, *rows, rows[0]])
    _, pool, bad = run(tmp_path, text, "a.csv", types=dict.fromkeys(names, "string"))
    assert bad == []
    assert [list(row.values())[1:] for row in pool.to_pylist()] == rows


@pytest.mark.parametrize("header", ["a,a", "a,,b", ""])
def test_headers_that_cannot_be(tmp_path: Path, header: str) -> None:
    with pytest.raises(ValueError, match="the first line must give every column a name of its own"):
        run(tmp_path, header + "\n1,2\n", "a.csv")


def test_lines_that_are_no_objects(tmp_path: Path) -> None:
    good = [{"n": i, "text": "€"} for i in range(6)]
    lines = lines_of(good).encode().splitlines()
    bad_lines = [b'{"n": "\\ud800"}', b'{"n": 1, "n": 2}', b"[1]", b'{"n": 01}', b'{"n": "\xff"}', b"{}", b'{"n"']
    data = b"\n".join([*lines[:3], *bad_lines, b"", *lines[3:]])
    summary, pool, bad = run(tmp_path, data, "a.jsonl")
    assert pool["n"].to_pylist() == list(range(6))
    assert [(b["line"], b["error"].split(":")[0]) for b in bad] == [
        (4, "not JSON"),
        (5, "a line must have every field once, got 'n' twice"),
        (6, "a line must be a JSON object, got list"),
        (7, "not JSON"),
        (8, "the text must be UTF-8"),
        (9, "a line must have at least one field"),
        (10, "not JSON"),
    ]
    assert "surrogate" in bad[0]["error"]
    assert (summary.records, summary.rows, summary.bad) == (13, 6, 7)


def test_csv_bad_records_have_their_lines(tmp_path: Path) -> None:
    data = b'a,b\r\n1,"x\r\ny"\r\n\r\n2\r\n3,\xff\r\n4,5,6\r\n7,8\r\n'
    _, pool, bad = run(tmp_path, data, "a.csv")
    assert pool.drop_columns(["id"]).to_pylist() == [{"a": 1, "b": "x\r\ny"}, {"a": 7, "b": "8"}]
    assert [(b["line"], b["error"]) for b in bad] == [
        (5, "a record must have 2 fields, got 1"),
        (6, "the text must be UTF-8"),
        (7, "a record must have 2 fields, got 3"),
    ]


def test_columns_that_some_files_lack_are_null(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "in" / "b.csv").write_text("c,a\n3,1\n3,\n")
    (tmp_path / "in" / "c.csv").write_text("b,a\n2,1\n5,x\n")
    (tmp_path / "in" / "d.csv").write_text("a,b\n")
    (tmp_path / "in" / "e.csv").write_text("")
    summary = ingest([str(tmp_path / "in")], tmp_path / "pool", ingest_options(format="csv", types={"a": "int64"}))
    pool = pq.read_table(tmp_path / "pool" / "part-00000.parquet").drop_columns(["id"]).to_pylist()
    assert pool == [{"a": 1, "b": 2, "c": None}, {"a": 1, "b": None, "c": 3}, {"a": None, "b": None, "c": 3}]
    assert summary.duplicates == 1, "columns have names, not places"
    assert summary.first_bad is not None
    assert (summary.first_bad["file"], summary.first_bad["line"]) == ("c.csv", 3)
    (tmp_path / "in" / "f.csv").write_text("9,8\n7,6\n")
    with pytest.raises(ValueError, match=r"f.csv has no column of a.csv \(a, b\), its first line is 9, 8; "):
        ingest([str(tmp_path / "in")], tmp_path / "other", ingest_options(format="csv"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_compressed_files_and_byte_order_marks(tmp_path: Path, ending: str, encoding: str) -> None:
    text = "key,text\n" + "".join(f'{i},"é {i}\n,"\n' for i in range(50))
    data = text.encode(encoding)
    if ending == ".gz":
        data = gzip.compress(data[:40]) + gzip.compress(data[40:])
    elif ending == ".zst":
        data = pa.Codec("zstd").compress(data, asbytes=True)
    _, pool, bad = run(tmp_path, data, f"a.csv{ending}", id_column="key")
    assert bad == []
    assert pool.to_pylist() == [{"key": i, "text": f"é {i}\n,"} for i in range(50)]


def test_a_damaged_file_keeps_what_is_before_the_damage(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i * 7919 % 10007}\n" for i in range(200_000))
    data = gzip.compress(("a,b\n" + rows).encode())
    _, pool, bad = run(tmp_path, data[: len(data) // 2], "a.csv.gz")
    assert pool["a"].to_pylist()[:50_000] == list(range(50_000))
    assert [(b["file"], b["line"]) for b in bad if b["line"] is None] == [("a.csv.gz", None)]
    assert "what follows in it cannot be read" in bad[-1]["error"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.txt.gz"])
def test_a_line_without_an_end_is_not_held(tmp_path: Path, name: str) -> None:
    head, tail = {
        "a.jsonl.gz": ('{"n": "x"}\n', '{"n": "y"}\n'),
        "a.csv.gz": ("n\nx\n", "y\n"),
        "a.txt.gz": ("x\n", "y\n"),
    }[name]
    bomb = gzip.compress(head.encode() + b"0" * 300 * 2**20 + b"\n" + tail.encode(), 1)
    tracemalloc.start()
    _, pool, bad = run(tmp_path, bomb, name, max_record_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pool.column(1).to_pylist() == ["x", "y"]
    assert [b["line"] for b in bad] == [len(head.splitlines()) + 1]
    assert bad[0]["error"] == "a record must have at most 1,048,576 bytes (--max-record-bytes)"
    assert peak < 100 * 2**20


def test_delimiters_and_files_without_a_header(tmp_path: Path) -> None:
    _, pool, bad = run(tmp_path, 'x\ty,z\t"1\t2"\n3\t4\t5\n6\t7\n', "a.csv", delimiter="\t", columns=("p", "q", "r"))
    assert pool.drop_columns(["id"]).to_pylist() == [
        {"p": "x", "q": "y,z", "r": "1\t2"},
        {"p": "3", "q": "4", "r": "5"},
    ]
    assert [(b["line"], b["error"]) for b in bad] == [(3, "a record must have 3 fields, got 2")]
    with pytest.raises(ValueError, match="delimiter must not be a quote or a line end"):
        ingest_options(format="csv", delimiter='"')


def test_one_unclosed_quote_costs_its_line(tmp_path: Path) -> None:
    rows = [f'{i},"t {i}"\n' for i in range(20_000)]
    rows[777] = '777,"never closed\n'
    rows[15_000] = '15000,"closed" late\n'
    _, pool, bad = run(tmp_path, "n,t\n" + "".join(rows), "a.csv")
    assert [b["line"] for b in bad] == [779, 15_002]
    assert pool["n"].to_pylist() == [i for i in range(20_000) if i not in (777, 15_000)]


def test_the_database_reads_nothing_else_and_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "secret.csv").write_text("a\n1\n")
    (tmp_path / "work").mkdir()
    with database.opened(tmp_path / "work", [str(tmp_path / "a.csv")]) as connection:
        count = "SELECT count(*) FROM read_csv('{}', columns = {{a: 'VARCHAR'}}, auto_detect = false, header = true)"
        assert database.run(connection, count.format(tmp_path / "a.csv")) == [(1,)]
        for sentence in (
            count.format(tmp_path / "secret.csv"),
            count.format("https://localhost:1/a.csv"),
            "INSTALL httpfs",
            f"ATTACH '{tmp_path / 'other.duckdb'}'",
            "SET enable_external_access = true",
        ):
            with pytest.raises(Exception, match=r"Permission|configuration"):
                database.run(connection, sentence)


def test_names_with_brackets_print_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "[bold] a.csv"
    source.write_text("[pos],[/INST]\n1,2\n1\n")
    result = CliRunner().invoke(app, ["ingest", str(source), "--out", str(tmp_path / "[p]"), "--format", "csv"])
    assert result.exit_code == 0, result.output
    assert "columns id (string), [pos] (int64), [/INST] (int64)." in result.output
    assert "the first: [bold] a.csv line 3: a record must have 2 fields, got 1" in result.output.replace("\n", " ")


def test_what_an_extra_is_needed_for_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: bytes) -> int:
        raise ValueError("TFRecord files need google-crc32c: pip install 'distilbeam[tfrecord]'")

    write_tfrecords(tmp_path / "a.tfrecord", [example({"x": [1.0]})])
    monkeypatch.setattr(tfrecord, "masked_crc", missing)
    with pytest.raises(ValueError, match="TFRecord files need google-crc32c"):
        ingest([str(tmp_path / "a.tfrecord")], tmp_path / "pool", ingest_options(format="tfrecord"))
    assert not (tmp_path / ".pool.ingest" / "index").exists()


def test_compressed_tfrecords_and_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    write_tfrecords(path, [example({"n": [2**53 + 1 + i], "x": [0.5]}) for i in range(20)])
    whole = gzip.compress(path.read_bytes())
    _, pool, bad = run(tmp_path, whole, "b.tfrecord.gz")
    assert pool["n"].to_pylist() == [2**53 + 1 + i for i in range(20)]
    assert bad == []
    _, pool, bad = run(tmp_path, whole[:-12], "c.tfrecord.gz")
    assert len(bad) == 1
    assert pool["x"].to_pylist()[:1] == [0.5]
