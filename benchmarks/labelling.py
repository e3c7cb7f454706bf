"""Rows per second of labelling, beside a loop without an engine and beside other people's.

    python benchmarks/labelling.py --quick
    python benchmarks/labelling.py --json benchmarks/results/labelling.json

Each measurement is a process of its own with one thread for arithmetic. Measured is the wall time of the labelling, from
the planning of the pool to the last file, the loading of the teacher and the start of the runner's workers included; imports
and the start of a Dask or Ray cluster, which a person would have running, are not. In each repetition every way has one
turn, and ratios are ratios of medians. The pool is float32 normal noise with ids (64 features and 10 classes unless said
otherwise), 62,500 rows in a row group, uncompressed, read before so that it lies in the page cache. The plain loop
encodes with distilbeam's codec, so that what is compared is the engine, and writes the same columns, a row group at a time,
without checksums, manifest and flushing. distilbeam with one worker reads the next batch in a thread of its own where a
processor is idle; with as many workers as processors it does not. Ways that are far slower are given the first rows only.
Memory is the process's peak resident set (for several processes the driver's alone). The parts "engines" (4 million rows) and
"short" (200,000) set Prism, where it is found (PRISM, or the PATH), beside the local runner, with one worker and with two of
`distilbeam workers`; processor time is this process's and that of the ended ones that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring.record import machine, write

SLOW = {  # part of the rows: 1 / this
    "RunInference + WriteToParquet": 20,
    "RunInference + WriteToParquetBatched": 5,
    "Ray Data, 2 actors": 4,
}
OURS = ("distilbeam", "distilbeam, 2 processes")
OVERHEAD = ("plain loop", "distilbeam")
TEACHER = "teacher alone"
CHOICE = ("plain loop, 5 % chosen", "distilbeam, 5 % chosen")
PARTS = ["cheap", "engines", "short", "slow", "choice", "growth", "plan"]
_CELL = ("rows", "files", "features", "layout")


def measure(way: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Run one way in a fresh process."""
    command = [sys.executable, __file__, "--one", way, "--arguments", json.dumps(arguments)]
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(way: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Label a pool in this process and time it."""
    import torch
    from measuring.choose_loops import distilbeam_choice, plain_choice
    from measuring.label_loops import WAYS, Task, clean_up, prepare, teacher_alone

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments["scratch"]) as directory:
        task = Task(
            pool=Path(arguments["pool"]),
            columns=tuple(arguments["columns"]),
            features=arguments["features"],
            classes=arguments["classes"],
            output=Path(directory) / "job",
            **arguments.get("more", {}),
        )
        prepare(way)
        start, used = time.perf_counter(), _processor_s()
        others = {CHOICE[0]: plain_choice, CHOICE[1]: distilbeam_choice, TEACHER: teacher_alone}
        (WAYS | others)[way](task)
        seconds, used = time.perf_counter() - start, _processor_s() - used
        rows = _rows_written(task.output)
        clean_up(task)
    wanted = {**dict.fromkeys(CHOICE, round(0.05 * arguments["rows"])), TEACHER: 0}.get(way, arguments["rows"])
    assert rows == wanted, f"{way} wrote {rows:,} rows of {wanted:,}"
    return {"seconds": seconds, "processor_s": used, "rows": arguments["rows"], "peak_mb": _peak_bytes() / 1e6}


def _processor_s() -> float:
    """Return the processor time of this process and of those that it started and that have ended, such as Prism."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_bytes() -> int:
    """Return the largest resident set of this program; `ru_maxrss` would be that of the one that started it, if larger."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def compare(ways: list[str], scratch: Path, rows: int, repeats: int, **more: Any) -> list[dict[str, Any]]:
    """Measure several ways in turn over one pool."""
    from measuring.label_loops import PRISM, PRISM_2

    pools = {part: pool_arguments(scratch, max(1, rows // part), **more) for part in {SLOW.get(way, 1) for way in ways}}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            runs[way].append(measure(way, pools[SLOW.get(way, 1)]))
            print(f"  {way:40} {runs[way][-1]['rows'] / runs[way][-1]['seconds'] / 1e6:8.3f} M rows/s", flush=True)
    table = []
    for way in ways:
        rate = statistics.median(run["rows"] / run["seconds"] for run in runs[way])
        table.append(
            {
                "way": way,
                "rows": runs[way][0]["rows"],
                "rows_per_s": rate,
                "rates": [run["rows"] / run["seconds"] for run in runs[way]],
                "processor_s": statistics.median(run["processor_s"] for run in runs[way]),
                "peak_mb": statistics.median(run["peak_mb"] for run in runs[way]),
            }
        )
    for row in table:
        several = (
            "workers" in row["way"] or "processes" in row["way"] or "threads" in row["way"] or "actors" in row["way"]
        )
        limit = CHOICE[0] if row["way"] in CHOICE else "plain loop, 2 processes" if several else "plain loop"
        limit = TEACHER if TEACHER in ways else limit
        limits = [other["rows_per_s"] for other in table if other["way"] == limit]
        row["of_limit"] = row["rows_per_s"] / limits[0] if limits else None
        local = {PRISM: "distilbeam", PRISM_2: "distilbeam, 2 processes"}.get(row["way"])
        for other in table:
            if other["way"] == local:
                row["of_local_runner"] = row["rows_per_s"] / other["rows_per_s"]
                row["processor_s_of_local_runner"] = row["processor_s"] / other["processor_s"]
        one = [other["rows_per_s"] for other in table if other["way"] == "plain loop"]
        row["of_one_process"] = row["rows_per_s"] / one[0] if one else None
    return table


def pool_arguments(
    scratch: Path,
    rows: int,
    features: int = 64,
    classes: int = 10,
    files: int = 16,
    layout: str = "fixed_size_binary",
    **more: Any,
) -> dict[str, Any]:
    """Make the pool of a measurement, where it is not there yet."""
    from measuring.pools import write_pool

    group_rows = min(62_500, max(1, 16_000_000 // features))
    where = scratch / f"pool-{rows}-{features}-{files}-{layout}"
    pool, columns = write_pool(where, rows, features, files, layout, group_rows)
    for file in pool.glob("*.parquet"):
        file.read_bytes()
    return {
        "scratch": str(scratch), "pool": str(pool), "columns": columns, "rows": rows, "features": features,
        "classes": classes, "more": more,
    }  # fmt: skip


def growth(scratch: Path, quick: bool, repeats: int) -> list[dict[str, Any]]:
    """Measure how time and memory grow with rows, files and features, and what each layout costs."""
    cells: list[dict[str, Any]] = [{"rows": rows} for rows in ((10**4, 10**5) if quick else (10**5, 10**6, 10**7))]
    cells += [{"rows": 10**5 if quick else 10**6, "files": files} for files in ((1, 10) if quick else (1, 100, 1000))]
    widths = (10, 1000) if quick else (10, 100, 1000, 10_000)
    cells += [{"rows": max(1000, (10**6 if quick else 10**8) // width), "features": width} for width in widths]
    layouts = ("fixed_size_list", "flat", "binary")
    cells += [{"rows": 10**4 if quick else 10**6, "layout": layout} for layout in layouts]
    table = []
    for cell in cells:
        print(cell)
        pair = compare(list(OVERHEAD), scratch, cell["rows"], repeats, **{k: v for k, v in cell.items() if k != "rows"})
        ours = pair[-1]
        table.append(
            {**cell, "rows_per_s": ours["rows_per_s"], "of_limit": ours["of_limit"], "peak_mb": ours["peak_mb"]}
        )
    return table


def forecast(scratch: Path, rows: int, repeats: int) -> dict[str, float]:
    """Compare what `plan` expects with what the labelling takes, medians, for a teacher of 2 ms a call of 256 rows."""
    arguments = pool_arguments(scratch, rows, teacher_batch=256, seconds_per_call=0.002)
    turns = [[measure(way, arguments)["seconds"] for way in ("plan", "distilbeam")] for _ in range(repeats)]
    expected, taken = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    return {"expected_s": expected, "taken_s": taken, "ratio": expected / taken}


def plan_seconds(arguments: dict[str, Any]) -> dict[str, float]:
    """Forecast a labelling in this process."""
    from measuring.label_loops import Task

    from distilbeam.pipelines.engine.beam_options import pipeline_options
    from distilbeam.pipelines.forecast.forecast import forecast_labelling
    from distilbeam.pipelines.jobs.labelling import opened_job

    with tempfile.TemporaryDirectory(dir=arguments["scratch"]) as directory:
        task = Task(
            Path(arguments["pool"]), tuple(arguments["columns"]), arguments["features"], arguments["classes"],
            Path(directory) / "job", **arguments["more"],
        )  # fmt: skip
        with opened_job(task.config().relative_to(Path(directory))) as job:
            expected = forecast_labelling(job, job.plan(), pipeline_options(), 8192)
    return {"seconds": expected.total.seconds, "rows": expected.total.rows}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small pools, one repetition, no peers that start clusters"
    )
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows of the main comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measurements to take; all by default")
    parser.add_argument("--scratch", type=Path, help="folder for pools, 15 GB; a temporary one by default")
    parser.add_argument("--json", type=Path, help="write machine, versions, command and figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = plan_seconds(options.arguments) if options.one == "plan" else one(options.one, options.arguments)
        print(json.dumps(work), flush=True)
        os._exit(0)  # clusters leave threads behind that would keep the interpreter
    about = machine(("apache-beam", "pyarrow", "torch", "numpy", "dask", "ray"))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = 200_000 if options.quick else options.rows
        results = figures(options.parts, Path(scratch), options.quick, rows, options.repeats)
    show(results)
    write(options.json, about, results)


def figures(parts: list[str], scratch: Path, quick: bool, rows: int, repeats: int) -> dict[str, Any]:
    """Take the measurements."""
    from measuring.label_loops import PRISM, PRISM_2, WAYS

    from distilbeam.pipelines.engine.prism import find_prism

    ways = [way for way in WAYS if not (quick and ("Dask" in way or "Ray" in way))]
    if find_prism() is None:
        ways = [way for way in ways if "Prism" not in way]
        if "engines" in parts or "short" in parts:
            print("Prism is not here (PRISM, PATH): it is not measured")
    engines = [way for way in ("plain loop", "plain loop, 2 processes", *OURS, PRISM, PRISM_2) if way in ways]
    slow_teacher = {"teacher_batch": 64, "seconds_per_call": 0.005}
    repeats = 1 if quick else repeats
    few = 1 if quick else min(3, repeats)
    takes = {
        "cheap": lambda: compare([way for way in ways if "Prism" not in way], scratch, rows, repeats),
        "engines": lambda: compare(engines, scratch, min(rows, 4_000_000), repeats),
        "short": lambda: compare(engines, scratch, 200_000, repeats),
        "slow": lambda: compare([TEACHER, *OVERHEAD], scratch, 6_400 if quick else 640_000, few, **slow_teacher),
        "choice": lambda: compare(list(CHOICE), scratch, rows, few),
        "growth": lambda: growth(scratch, quick, few),
        "plan": lambda: [forecast(scratch, 51_200 if quick else 1_024_000, few)],
    }
    return {part: takes[part]() for part in parts}


def show(results: dict[str, Any]) -> None:
    """Print the figures."""
    for part, table in results.items():
        print(f"\n{part}")
        for row in table:
            if part == "plan":
                print(", ".join(f"{name} {value:.2f}" for name, value in row.items()))
                continue
            what = row.get("way") or ", ".join(f"{name} {row[name]}" for name in _CELL if name in row)
            ratio = "" if row["of_limit"] is None else f"{row['of_limit']:6.2f} of the limit"
            alone = f"{row['of_one_process']:6.2f} of one process" if row.get("of_one_process") else ""
            local = f"{row['of_local_runner']:6.2f} of the local runner" if "of_local_runner" in row else ""
            rate = f"{row['rows_per_s'] / 1e6:8.3f} M rows/s"
            print(f"{what:42} {rate} {ratio} {alone} {local} {row['peak_mb']:8.0f} MB")


def _rows_written(directory: Path) -> int:
    import pyarrow.parquet as pq

    files = [file for file in directory.rglob("*.parquet") if not {"selected", "dead"} & set(file.parts)]
    return sum(pq.read_metadata(file).num_rows for file in files)


if __name__ == "__main__":
    main()
