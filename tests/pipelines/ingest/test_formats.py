"""Each source format: what becomes of its records, and of the bad ones among them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sources import example, png, write_tfrecords

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.ingest.ingesting import Summary, ingest
from distilbeam.pipelines.ingest.settings import ingest_options


def run(tmp_path: Path, *sources: str, **settings: Any) -> tuple[Summary, pa.Table, list[dict[str, Any]]]:
    """Ingest sources of `tmp_path`; return the summary, the pool and the dead letters."""
    out = tmp_path / "pool"
    paths = [str(tmp_path / source) for source in sources]
    summary = ingest(paths, out, ingest_options(**settings), beam=pipeline_options())
    letters = out / "_dead_letters.jsonl"
    bad = [json.loads(line) for line in letters.read_text().splitlines()] if letters.exists() else []
    assert len(bad) == summary.bad
    pool = pa.concat_tables(pq.read_table(file) for file in sorted(out.glob("*.parquet")))
    assert pool.num_rows == summary.rows
    return summary, pool, bad


def test_csv_types_quotes_and_bad_records(tmp_path: Path) -> None:
    good = "".join(f"{i},{i}.25,{str(i % 2 == 0).lower()},word {i}\n" for i in range(3, 40))
    (tmp_path / "a.csv").write_text(
        "number,fraction,flag,text\r\n"
        "0,0.5,true,plain\r\n"
        '1,1e3,false,"quoted, with ""quotes"" and\na line end"\n'
        "2,,NA,\n"
        "3,1\n"
        "\n"
        "x,1,true,not a number\n"
        '4,1,true,"never closed\n'
        "5,5.5,true,after it\n"
        '6,1,true,"stray" text\n' + good
    )
    summary, pool, bad = run(tmp_path, "a.csv", format="csv")
    assert {f.name: str(f.type) for f in pool.schema} == {
        "id": "string",
        "number": "int64",
        "fraction": "double",
        "flag": "bool",
        "text": "string",
    }
    rows = pool.drop_columns(["id"]).slice(0, 4).to_pylist()
    assert rows == [
        {"number": 0, "fraction": 0.5, "flag": True, "text": "plain"},
        {"number": 1, "fraction": 1000.0, "flag": False, "text": 'quoted, with "quotes" and\na line end'},
        {"number": 2, "fraction": None, "flag": None, "text": None},
        {"number": 5, "fraction": 5.5, "flag": True, "text": "after it"},
    ]
    assert [(letter["file"], letter["line"], letter["error"]) for letter in bad] == [
        ("a.csv", 6, "a record must have 4 fields, got 2"),
        ("a.csv", 8, "column number must be int64, got 'x'"),
        ("a.csv", 9, "not CSV: ',' expected after '\"'"),
        ("a.csv", 11, "not CSV: ',' expected after '\"'"),
    ]
    assert bad[0]["record"] == "3,1"
    assert summary.records == 4 + 37 + 4
    assert pool.num_rows == 41


def test_csv_plain_and_strict_readers_agree(tmp_path: Path) -> None:
    lines = [f"{i},{i * 0.5},t{i}" for i in range(200)]
    lines[50] = "7"
    lines[60] = ""
    lines[70] = "1,2,3,4"
    text = "a,b,c\n" + "\n".join(lines) + "\n"
    (tmp_path / "plain.csv").write_text(text)
    (tmp_path / "strict.csv").write_text(text + '"200",1,"q"\n')
    _, plain, plain_bad = run(tmp_path, "plain.csv", format="csv")
    (tmp_path / "pool").rename(tmp_path / "first")
    _, strict, strict_bad = run(tmp_path, "strict.csv", format="csv")
    assert strict.slice(0, plain.num_rows).equals(plain)
    assert [(b["line"], b["error"]) for b in plain_bad] == [(b["line"], b["error"]) for b in strict_bad]
    assert [b["line"] for b in plain_bad] == [52, 72]


def test_csv_codes_stay_as_they_are(tmp_path: Path) -> None:
    rows = [f"0{i},{10**17 + i},{10**19 + i},{i}e2,00{i}" for i in range(10, 40)]
    (tmp_path / "a.csv").write_text("code,large,larger,exponent,forced\n" + "\n".join([*rows, "011,1,2,x,x"]) + "\n")
    _, pool, bad = run(tmp_path, "a.csv", format="csv", types={"forced": "int64"})
    assert [str(field.type) for field in pool.schema][1:] == ["string", "int64", "string", "double", "int64"]
    assert pool["code"].to_pylist() == [f"0{i}" for i in range(10, 40)]
    assert pool["large"].to_pylist() == [10**17 + i for i in range(10, 40)]
    assert pool["larger"].to_pylist() == [str(10**19 + i) for i in range(10, 40)]
    assert pool["exponent"].to_pylist() == [100.0 * i for i in range(10, 40)]
    assert pool["forced"].to_pylist() == list(range(10, 40))
    assert [(b["line"], b["error"]) for b in bad] == [(32, "column exponent must be float64, got 'x'")]


def test_csv_columns_become_a_vector_that_teachers_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 6))
    lines = [",".join([f"k{i}", *map(str, row)]) for i, row in enumerate(pixels)]
    lines[4] = "k4,1,2,3,4,5,256"
    lines[9] = "k9,1,2,,4,5,6"
    (tmp_path / "a.csv").write_text("key," + ",".join(f"p{i}" for i in range(6)) + "\n" + "\n".join(lines))
    vector = {"pixels": {"columns": ["p*"], "dtype": "uint8", "shape": [2, 3]}}
    _, pool, bad = run(tmp_path, "a.csv", format="csv", vectors=vector, id_column="key")
    assert [(b["line"], b["error"]) for b in bad] == [
        (6, "columns of vector pixels must all be uint8 numbers"),
        (11, "columns of vector pixels must all be uint8 numbers"),
    ]
    assert pool.schema.field("pixels").type == pa.binary(6)
    read = make_input(InputConfig(columns=("pixels",)))(pool.combine_chunks().to_batches()[0])
    np.testing.assert_array_equal(read, np.delete(pixels, [4, 9], axis=0).reshape(-1, 2, 3))
    assert pool["key"].to_pylist() == [f"k{i}" for i in range(30) if i not in (4, 9)]


def test_json_lines(tmp_path: Path) -> None:
    records: list[Any] = [{"text": f"n {i}", "x": [i, i + 0.5], "grid": [[i, 1], [2, 3]], "n": i} for i in range(30)]
    records[3]["x"] = [1.0]
    records[4]["n"] = "four"
    records[5] = [1, 2]
    records[6]["extra"] = {"deep": [1, None]}
    lines = [json.dumps(record) for record in records]
    lines[7] = '{"text": "cut'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    _, pool, bad = run(tmp_path, "a.jsonl", format="jsonl")
    assert [(b["line"], b["error"].split(":")[0]) for b in bad] == [
        (4, "column x must be float32 [2], got shape [1]"),
        (5, "column n must be int64, got 'four'"),
        (6, "a line must be a JSON object, got list"),
        (8, "not JSON"),
    ]
    kept = [record for i, record in enumerate(records) if i not in (3, 4, 5, 7)]
    assert pool["n"].to_pylist() == [record["n"] for record in kept]
    assert pool.schema.field("grid").metadata == {b"dtype": b"uint8", b"shape": b"[2, 2]"}
    x = np.frombuffer(b"".join(pool["x"].to_pylist()), "<f4").reshape(-1, 2)
    np.testing.assert_array_equal(x, [record["x"] for record in kept])
    assert [value for value in pool["extra"].to_pylist() if value is not None] == ['{"deep":[1,null]}']


def test_tfrecord_with_damaged_records(tmp_path: Path) -> None:
    records = [
        example({"x": [i + 0.5, 2.0, 3.0], "n": [i - 5], "name": [f"e{i}".encode()], "raw": [bytes([i, 255, 0])]})
        for i in range(30)
    ]
    records[2] = b"\xff\xff\xff"  # no protocol buffer
    path = tmp_path / "a.tfrecord"
    starts = write_tfrecords(path, records)
    data = bytearray(path.read_bytes())
    data[starts[10] + 20] ^= 1  # data of record 11
    data[starts[28]] ^= 1  # length of record 29
    path.write_bytes(data)
    _, pool, bad = run(tmp_path, "a.tfrecord", format="tfrecord", id_column="name")
    assert [b["line"] for b in bad] == [3, 11, 29]
    assert "checksum of this record is wrong" in bad[1]["error"]
    assert "length of this record is damaged; what follows it in the file cannot be read" in bad[2]["error"]
    kept = [i for i in range(28) if i not in (2, 10)]
    assert pool["name"].to_pylist() == [f"e{i}" for i in kept]
    assert pool["n"].to_pylist() == [i - 5 for i in kept]
    assert pool["raw"].to_pylist() == [bytes([i, 255, 0]) for i in kept]
    x = np.frombuffer(b"".join(pool["x"].to_pylist()), "<f4").reshape(-1, 3)
    np.testing.assert_array_equal(x, [[i + 0.5, 2, 3] for i in kept])


def test_tfrecord_does_not_import_tensorflow(tmp_path: Path) -> None:
    write_tfrecords(tmp_path / "a.tfrecord", [example({"x": [float(i)]}) for i in range(3)])
    code = (
        "import sys; from pathlib import Path\n"
        "from distilbeam.pipelines.engine.beam_options import pipeline_options\n"
        "from distilbeam.pipelines.ingest.ingesting import ingest\n"
        "from distilbeam.pipelines.ingest.settings import ingest_options\n"
        "options = ingest_options(format='tfrecord')\n"
        f"done = ingest(['{tmp_path}'], Path('{tmp_path}/pool'), options, beam=pipeline_options())\n"
        "print(done.rows, 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["3", "False"]


def test_a_tfrecord_that_ends_early_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    starts = write_tfrecords(path, [example({"x": [float(i)]}) for i in range(5)])
    path.write_bytes(path.read_bytes()[: starts[3] + 15])
    _, pool, bad = run(tmp_path, "a.tfrecord", format="tfrecord")
    assert pool["x"].to_pylist() == [0.0, 1.0, 2.0]
    assert [(b["line"], b["error"].split(";")[0]) for b in bad] == [(4, "the file ends within this record")]


def test_text_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\r\n\n  \nzwölf\n".encode() + b"\xff\xfe bad\nlast")
    _, pool, bad = run(tmp_path, "a.txt", format="text")
    assert pool["text"].to_pylist() == ["first", "zwölf", "last"]
    assert [b["line"] for b in bad] == [5]
    assert bad[0]["error"].startswith("the text must be UTF-8")


def test_image_folders(tmp_path: Path) -> None:
    for folder, shades in (("cat", (1, 2)), ("dog", (3, 1))):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for i, shade in enumerate(shades):
            (tmp_path / "images" / folder / f"{i}.png").write_bytes(png(shade))
    (tmp_path / "images" / "cat" / "copy.png").write_bytes(png(2))
    (tmp_path / "images" / "dog" / "no.png").write_text("not an image")
    (tmp_path / "images" / ".hidden.png").write_bytes(png(9))
    summary, pool, bad = run(tmp_path, "images", format="images", class_column="label")
    assert [(b["file"], b["line"]) for b in bad] == [("dog/no.png", None)]
    assert bad[0]["error"].startswith("not an image: cannot identify")
    assert summary.duplicates == 1
    assert pool["path"].to_pylist() == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert pool["label"].to_pylist() == ["cat", "cat", "dog", "dog"]
    assert pool["image"].to_pylist() == [png(1), png(2), png(3), png(1)]
    assert len(set(pool["id"].to_pylist())) == 4


def test_compressed_files_and_a_damaged_one(tmp_path: Path) -> None:
    lines = b"".join(b'{"n": %d}\n' % i for i in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    rng = np.random.default_rng(0)
    other = b"".join(b'{"n": %d}\n' % i for i in rng.integers(10_000, 10**9, 200_000))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(other)[:-100_000])
    (tmp_path / "c.jsonl").write_bytes(b'{"n": -1}\n')
    summary, pool, bad = run(tmp_path, "*", format="jsonl")
    numbers = pool["n"].to_pylist()
    assert numbers[:2000] == list(range(2000))
    assert numbers[-1] == -1
    assert summary.files == 3
    assert [b["file"] for b in bad if b["line"] is None] == ["b.jsonl.gz"]
    assert "what follows in it cannot be read" in bad[-1]["error"]
