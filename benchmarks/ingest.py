"""Ingest: seconds for a pool out of CSV and JSON lines, beside what DuckDB, pandas and pyarrow need for less.

    python benchmarks/ingest.py                                        # 10^6 rows, some ten minutes
    python benchmarks/ingest.py --quick                                # its short form
    python benchmarks/ingest.py --json benchmarks/results/ingest.json
    python benchmarks/ingest.py --against ~/checkout-of-another-version

The peers read a file and write Parquet (zstd): they find the types in a part of it or in memory, keep no bad record, give no
ids and keep what is repeated. "DuckDB+" is the limit for what ingest writes: DuckDB's reader, DISTINCT and the same hash as
an id, without a look at the values. Every run is a process of its own, all in turns. Seconds on the processor (all threads,
imports included) are disturbed less by a busy machine than those of the clock; both are given, as are the ratios of medians.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measuring.record import machine, write
from rich.console import Console
from rich.table import Table

_WORDS = np.array(["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"])
_SOURCES = ("plain.csv", "quoted.csv", "numbers.csv", "plain.csv.gz", "lines.jsonl")
_PEERS = {
    "DuckDB": """
import duckdb
duckdb.sql(f"COPY (FROM '{path}') TO '{out}' (FORMAT parquet, COMPRESSION zstd)")
""",
    "DuckDB+": """
import duckdb
columns = duckdb.sql(f"FROM '{path}'").columns
content = ", ".join(f"'{len(name)}:{name}', strlen({name}::VARCHAR), ':', {name}::VARCHAR" for name in columns)
duckdb.sql(f"COPY (SELECT left(sha256(concat({content})), 32) AS id, * FROM (SELECT DISTINCT * FROM '{path}')) "
    f"TO '{out}' (FORMAT parquet, COMPRESSION zstd)")
""",
    "pandas": """
import pandas
table = pandas.read_json(path, lines=True) if path.endswith("jsonl") else pandas.read_csv(path)
table.to_parquet(out, compression="zstd")
""",
    "pyarrow": """
import pyarrow.csv, pyarrow.json, pyarrow.parquet
table = (pyarrow.json.read_json if path.endswith("jsonl") else pyarrow.csv.read_csv)(path)
pyarrow.parquet.write_table(table, out, compression="zstd")
""",
}


def write_sources(folder: Path, rows: int) -> None:
    """Write the same records in several forms, and a table of numbers; one record in a hundred is a repetition."""
    rng = np.random.default_rng(0)
    texts = [" ".join(words) for words in _WORDS[rng.integers(0, 10, (rows, 8))]]
    amounts, codes = rng.integers(10**6, size=rows).tolist(), rng.integers(10**5, size=rows).tolist()
    scores, vectors = (rng.random(rows) * 100).round(3).tolist(), rng.random((rows, 8)).round(4).tolist()
    with (
        (folder / "plain.csv").open("w") as plain,
        (folder / "quoted.csv").open("w") as quoted,
        (folder / "numbers.csv").open("w") as numbers,
        (folder / "lines.jsonl").open("w") as lines,
    ):
        for file in (plain, quoted):
            file.write("key,amount,score,flag,code,text\n")
        numbers.write("n," + ",".join(f"x{i}" for i in range(8)) + "\n")
        for row in range(rows):
            i = row - 50 if row % 100 == 99 else row
            key, amount, score, text, code = f"k{i}", amounts[i], scores[i], texts[i], f"{codes[i]:05d}"
            flag = "true" if i % 2 else "false"
            plain.write(f"{key},{amount},{score},{flag},{code},{text}\n")
            quoted.write(f'"{key}",{amount},{score},{flag},"{code}","{text}, said ""he"""\n')
            numbers.write(f"{i}," + ",".join(map(str, vectors[i])) + "\n")
            record = {"key": key, "amount": amount, "score": score, "flag": bool(i % 2), "code": code, "text": text}
            lines.write(json.dumps(record | {"x": vectors[i]}) + "\n")
    with (folder / "plain.csv").open("rb") as file, gzip.open(folder / "plain.csv.gz", "wb", 6) as packed:
        shutil.copyfileobj(file, packed)


def measured(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command; return its seconds by the clock and on the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=Path(command[-1]).parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(source: Path, repeats: int, against: Path | None) -> list[dict[str, Any]]:
    """Ingest a file and give it to the peers, in turns; return a row for each."""
    out = source.parent / "pool"
    format_ = "jsonl" if source.suffix == ".jsonl" else "csv"
    ingest = [sys.executable, "-m", "distilbeam", "ingest", "--format", format_, str(source), "--out", str(out)]
    commands: dict[str, tuple[list[str], dict[str, str] | None]] = {"ingest": (ingest, None)}
    if against is not None:
        commands["against"] = (ingest, {**os.environ, "PYTHONPATH": str(against.resolve())})
    for name, code in _PEERS.items():
        commands[name] = (
            [sys.executable, "-c", "import sys; path, out = sys.argv[1:]" + code, str(source), str(out)],
            None,
        )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, (command, environment) in commands.items():
            times[name].append(measured(command, environment))
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    rows = []
    ours = [median(run[i] for run in times["ingest"]) for i in (0, 1)]
    for name, runs in times.items():
        theirs = [median(run[i] for run in runs) for i in (0, 1)]
        row: dict[str, Any] = {"source": source.name, "MB": round(source.stat().st_size / 1e6, 1), "reader": name}
        row |= {"s": round(theirs[0], 2), "processor s": round(theirs[1], 2)}
        row |= {"ingest / it": round(ours[0] / theirs[0], 2), "on the processor": round(ours[1] / theirs[1], 2)}
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, help="a checkout of another version of distilbeam, timed as well")
    parser.add_argument("--quick", action="store_true", help="50,000 rows, once")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.repeats = 50_000, 1
    about = machine(("duckdb", "pandas", "pyarrow"))
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), arguments.rows)
        rows = [row for name in _SOURCES for row in compare(Path(folder) / name, arguments.repeats, arguments.against)]
    table = Table(*rows[0], title=f"{arguments.rows:,} rows")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    write(arguments.json, about, {"rows": arguments.rows, "sources": rows})


if __name__ == "__main__":
    main()
