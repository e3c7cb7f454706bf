"""Ingest: seconds and memory for a pool out of CSV and JSON lines, beside what pyarrow and pandas need for less.

    python benchmarks/ingest.py                                        # 10^6 rows, about two minutes
    python benchmarks/ingest.py --rows 50000                           # its short form
    python benchmarks/ingest.py --json benchmarks/results/ingest.json

The peer reads a whole file with pyarrow's reader, which finds the types in a part of it and keeps no bad record, takes exact
repetitions out with pandas and writes Parquet. Every run is a process of its own, the two in turns. Seconds on the processor
(all threads, imports included) are disturbed less by a busy machine than those of the clock; both are given.
"""

from __future__ import annotations

import argparse
import json
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

_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
_READERS = {
    "plain.csv": "csv.read_csv(path)",
    "quoted.csv": "csv.read_csv(path)",
    "lines.jsonl": "json.read_json(path)",
}
_PEER = """
import sys, pyarrow as pa, pyarrow.csv as csv, pyarrow.json as json, pyarrow.parquet as pq
path, out = sys.argv[1:]
frame = {reader}.to_pandas()
text = frame.select_dtypes(exclude="object").columns if "x" in frame else frame.columns
pq.write_table(pa.Table.from_pandas(frame[~frame.duplicated(list(text))]), out, compression="zstd")
"""


def write_sources(folder: Path, rows: int) -> None:
    """Write the same records three times; one in a hundred is a repetition."""
    rng = np.random.default_rng(0)
    with (
        (folder / "plain.csv").open("w") as plain,
        (folder / "quoted.csv").open("w") as quoted,
        (folder / "lines.jsonl").open("w") as lines,
    ):
        for file in (plain, quoted):
            file.write("key,amount,score,flag,code,text\n")
        records: list[dict[str, Any]] = []
        for i in range(rows):
            if i % 100 == 99:
                record = records[-50]
            else:
                text, x = " ".join(rng.choice(_WORDS, 8)), rng.random(8).round(4).tolist()
                score, code = round(float(rng.random()) * 100, 3), f"{rng.integers(10**5):05d}"
                record = {"key": f"k{i}", "amount": int(rng.integers(10**6)), "score": score, "flag": bool(i % 2)}
                record |= {"code": code, "text": text, "x": x}
            records = [*records[-60:], record]
            key, amount, score, flag, code, text, _ = record.values()
            plain.write(f"{key},{amount},{score},{str(flag).lower()},{code},{text}\n")
            quoted.write(f'"{key}",{amount},{score},{str(flag).lower()},"{code}","{text}, said ""he"""\n')
            lines.write(json.dumps(record) + "\n")


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds by the clock and on the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(source: Path, repeats: int) -> dict[str, Any]:
    """Ingest a file and give it to the peer, in turns."""
    out, peer_out = source.parent / "pool", source.parent / "peer.parquet"
    ours = [sys.executable, "-m", "distilbeam", "ingest", str(source), "--out", str(out), "--format"]
    ours += [{".csv": "csv", ".jsonl": "jsonl"}[source.suffix]]
    peer = [sys.executable, "-c", _PEER.format(reader=_READERS[source.name]), str(source), str(peer_out)]
    times: dict[str, list[tuple[float, float]]] = {"ingest": [], "peer": []}
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        times["ingest"].append(measured(ours))
        times["peer"].append(measured(peer))
    row: dict[str, Any] = {"source": source.name, "MB": round(source.stat().st_size / 1e6, 1)}
    for name, runs in times.items():
        row[f"{name} s"], row[f"{name} processor s"] = (round(median(run[i] for run in runs), 2) for i in (0, 1))
    return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = machine(("duckdb", "pandas", "pyarrow"))
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), arguments.rows)
        rows = [compare(Path(folder) / name, arguments.repeats) for name in _READERS]
    table = Table(*rows[0], title=f"{arguments.rows:,} rows")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    write(arguments.json, about, {"rows": arguments.rows, "sources": rows})


if __name__ == "__main__":
    main()
