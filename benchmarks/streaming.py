"""The streaming job on a real broker and real Prism: what is lost when everything dies, and how fast it is beside a plain loop.

    python benchmarks/streaming.py --quick
    python benchmarks/streaming.py --json benchmarks/results/streaming.json

It needs the development environment, Java 17, a Kafka broker (KAFKA_JARS) and Prism (PRISM or the PATH); see `tests/support/engines.py`.

Part `deaths`: messages on four partitions at a rate, while the job is killed (kill -9) twice and the broker once; then every
message must be labelled once, with the values that a batch job gives. Part `rate`: a topic that is full already, its messages'
times spread over an hour, in turns with a plain loop (`measuring/stream_ways.py`); the rate is that of the messages between
two sizes, so that starts cost nothing on either side. Its teacher `linear` costs nothing, so that what the job itself costs is
seen; `network` is a small one that does, `wide` one of realistic cost. Part `far` is the same with a teacher on four servers that
take their time for every request, beside one plain loop and two. Part `latency`: the time from a message to the file that
commits its label, at steady rates, both ways at once on the same messages. Part `hour`: 3.6 million messages of an hour in
replay, and what memory that takes.

Results of several calls lie in one file where `--json` names it: each call replaces the parts that it has measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import numpy as np
import psutil
import pyarrow.parquet as pq
import tomli_w
from engines import SCHEMA, Broker, labels_in, require_prism, rows, send, streaming, wait_for
from measuring.record import machine, write
from measuring.stream_ways import OURS, PARTITIONS, PLAIN, PLAIN_TWICE, Task, do, far_teachers
from measuring.stream_ways import SCHEMA as TIMED

from distilbeam.teacher.softlabels import decode, read_manifest

WINDOW_S = 5


def config_file(
    folder: Path, teacher: str = "logging", carry: tuple[str, ...] = ("x",), far: Sequence[str] = ()
) -> Path:
    """Write the configuration of a labelling job.

    Args:
      folder: where it is written; it is made.
      teacher: which of the teachers; "logging" keeps a log of what it is asked.
      carry: the carried columns.
      far: addresses of the teacher "far".
    """
    folder.mkdir(parents=True)
    models: dict[str, dict[str, Any]] = {
        "logging": {"model": "logging_teacher:LoggingTeacher", "arguments": {"log": str(folder / "asked.log")}},
        "linear": {"model": "logging_teacher:LoggingTeacher", "arguments": {"log": os.devnull}},
        "network": {"model": "measuring.stream_ways:Network"},
        "wide": {"model": "measuring.stream_ways:Network", "arguments": {"width": 2048}},
    }
    data = {"pool": "pool", "id": "key", "carry": list(carry), "num_classes": 3}
    if teacher == "far":
        asked = {
            "kind": "tfserving",
            "addresses": list(far),
            "model": "teacher",
            "input": {"column": "x", "shape": [4]},
        }
    else:
        asked = {"kind": "torch", **models[teacher], "input": {"columns": ["x"]}}
    job = {"data": data, "teacher": asked}
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps({"run": {"directory": "batch"}, **job}))
    return path


def options(broker: Broker, topic: str, config: Path, *more: str) -> list[str]:
    """Give the options of a streaming job."""
    source = ["--source", f"kafka:{broker.address}:{topic}", "--out", str(config.parent / "labels")]
    return [*source, *(() if "--schema" in more else ("--schema", SCHEMA)), *more]


def deaths(broker: Broker, scratch: Path, prism: Path, count: int, rate: int) -> dict[str, Any]:
    """Kill the job twice and the broker once while messages come; compare with a batch job over the same rows."""
    topic, config = "deaths", config_file(scratch / "deaths")
    broker.make_topic(topic, PARTITIONS)
    sent, out = rows(count), config.parent / "labels"
    window = ("--window-s", str(WINDOW_S))
    producing = threading.Thread(target=produce, args=(broker, topic, sent, rate), daemon=True)
    producing.start()
    start = time.monotonic()
    for share in (0.25, 0.5):
        with streaming(config, *options(broker, topic, config, *window), prism=prism) as process:
            wait_for(lambda share=share: committed(out) >= share * count, 600)
            process.kill()
            print(f"  job killed with {committed(out):,} labels committed", flush=True)
    with streaming(config, *options(broker, topic, config, *window), prism=prism) as process:
        wait_for(lambda: committed(out) >= 0.7 * count, 600)
        broker.kill()
        print(f"  broker killed with {committed(out):,} labels committed", flush=True)
        time.sleep(5)
        broker.start()
        producing.join()
        wait_for(lambda: committed(out) >= count, 600)
        seconds = time.monotonic() - start
        process.terminate()
        assert process.wait(60) == 0
    table = labels_in(out)
    times = Counter(table["example_id"].to_pylist())
    times_asked = Counter((config.parent / "asked.log").read_text().split())
    return {
        "messages": count,
        "rate": rate,
        "seconds": round(seconds, 1),
        "lost": count - len(times),
        "doubled": sum(number > 1 for number in times.values()),
        "asked_again": sum(times_asked.values()) - len(times_asked),
        "asked_again_in_windows": round((sum(times_asked.values()) - len(times_asked)) / (rate * WINDOW_S), 2),
        "largest_difference_from_the_batch_job": difference_from_batch(config, sent),
    }


def committed(out: Path) -> int:
    """Count the labels that a manifest holds."""
    try:
        return read_manifest(out).rows
    except ValueError:
        return 0


def difference_from_batch(config: Path, sent: list[dict[str, Any]]) -> float:
    """Label the same rows with `distilbeam label`; return the largest difference of a log-probability."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (config.parent / "pool").mkdir()
    keys = pa.array([row["key"] for row in sent])
    x = pa.array([row["x"] for row in sent], pa.list_(pa.float32(), 4))
    pq.write_table(pa.table({"key": keys, "x": x}), config.parent / "pool" / "0.parquet")
    command = [sys.executable, "-m", "distilbeam", "label", str(config)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    sides = []
    for out in (config.parent / "labels", config.parent / "batch" / "labels"):
        table = labels_in(out).sort_by("example_id")
        sides.append((table["example_id"].to_pylist(), decode(table, read_manifest(out).spec).logprobs))
    assert sides[0][0] == sides[1][0]
    return float(np.abs(sides[0][1] - sides[1][1]).max())


def produce(broker: Broker, topic: str, sent: list[dict[str, Any]], rate: float) -> None:
    """Send messages at a rate; one that the broker has not taken is sent until it has."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": broker.address, "enable.idempotence": True, "log_level": 0})
    start = time.monotonic()
    for i, row in enumerate(sent):
        time.sleep(max(0.0, start + i / rate - time.monotonic()))
        producer.produce(topic, json.dumps(row).encode())
        producer.poll(0)
    producer.flush()


def rates(broker: Broker, scratch: Path, prism: Path, sizes: tuple[int, int], turns: int) -> list[dict[str, Any]]:
    """Measure the rate of both ways on topics that are full, for a teacher that costs nothing and for one that does."""
    for count in sizes:
        fill(broker, f"full-{count}", count)
    found = []
    for teacher in ("linear", "network", "wide"):
        few = sizes if teacher != "wide" else (sizes[0], sizes[0] * 3)
        if few[1] not in sizes:
            fill(broker, f"full-{few[1]}", few[1])
        runs = in_turns(broker, scratch, prism, (PLAIN, OURS), few, turns, teacher)
        found.append({"teacher": teacher, **compared(runs, few)})
    return found


def in_turns(
    broker: Broker,
    scratch: Path,
    prism: Path,
    ways: Sequence[str],
    sizes: tuple[int, int],
    turns: int,
    teacher: str,
    far: Sequence[str] = (),
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Do each way with each size in turns; return the figures of all runs, by way and size."""
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(turns):
        for way in ways:
            for count in sizes:
                folder = scratch / f"rate-{teacher}-{turn}-{way.replace(' ', '-')}-{count}"
                task = Task(way, broker.address, f"full-{count}", count, str(config_file(folder, teacher, far=far)))
                done = ended(begun(task, prism))
                runs.setdefault((way, count), []).append(done)
                took = f"{done['seconds']:7.2f} s {done['processor_s']:7.2f} s on the processor"
                print(f"  {teacher:8} {way:16} {count:9,} messages {took}", flush=True)
    return runs


def far(
    broker: Broker, scratch: Path, prism: Path, sizes: tuple[int, int], turns: int, delay_s: float
) -> dict[str, Any]:
    """Measure the rate with a teacher on four servers, each of which takes its time for every request."""
    for count in sizes:
        fill(broker, f"full-{count}", count)
    with far_teachers(delay_s, 4) as addresses:
        runs = in_turns(broker, scratch, prism, (PLAIN, PLAIN_TWICE, OURS), sizes, turns, "far", addresses)
        return {"delay_s": delay_s, **compared(runs, sizes)}


def compared(runs: dict[tuple[str, int], list[dict[str, float]]], sizes: tuple[int, int]) -> dict[str, Any]:
    """Take medians; give microseconds a message between the two sizes, so that starts cost nothing on either side."""

    def microseconds(way: str, what: str) -> float:
        small, large = (statistics.median(run[what] for run in runs[way, count]) for count in sizes)
        return 1e6 * (large - small) / (sizes[1] - sizes[0])

    figures: dict[str, Any] = {"sizes": list(sizes), "turns": len(runs[PLAIN, sizes[0]])}
    for way in dict.fromkeys(way for way, _ in runs):
        clock = microseconds(way, "seconds")
        figures[way] = {
            "messages_per_s": round(1e6 / clock),
            "us_a_message": round(clock, 2),
            "processor_us_a_message": round(microseconds(way, "processor_s"), 2),
        }
    for way in figures.keys() & {PLAIN, PLAIN_TWICE}:
        figures[f"rate_of_{way.replace(' ', '_')}"] = round(
            microseconds(way, "seconds") / microseconds(OURS, "seconds"), 3
        )
    return figures


def fill(broker: Broker, topic: str, count: int) -> None:
    """Fill a topic with messages whose times are spread over the last hour."""
    from confluent_kafka import Producer

    broker.make_topic(topic, PARTITIONS)
    features = [json.dumps(row["x"]) for row in rows(1_000)]
    producer = Producer({"bootstrap.servers": broker.address, "linger.ms": 20, "log_level": 0})
    first_ms = int(time.time() * 1000) - 3_600_000
    for i in range(count):
        value = f'{{"key": "key{i}", "x": {features[i % 1_000]}}}'
        while True:
            try:
                producer.produce(topic, value.encode(), timestamp=first_ms + 3_590_000 * i // count)
                break
            except BufferError:
                producer.poll(0.1)
        if not i % 1_000:
            producer.poll(0)
    assert producer.flush(60) == 0


def begun(task: Task, prism: Path) -> subprocess.Popen[str]:
    """Begin a task in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRISM": str(prism)}
    command = [sys.executable, __file__, "--one", json.dumps(asdict(task))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> dict[str, float]:
    """Wait for a task's end; return its figures."""
    said, _ = process.communicate()
    done: dict[str, float] = json.loads(said.splitlines()[-1])
    return done


def hour(broker: Broker, scratch: Path, prism: Path, count: int) -> dict[str, Any]:
    """Replay an hour's worth of messages, and watch the memory of the job, its worker and its engine."""
    fill(broker, "hour", count)
    task = Task(OURS, broker.address, "hour", count, str(config_file(scratch / "hour")))
    start, process = time.monotonic(), begun(task, prism)
    watched, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            memory = [each.memory_info().rss / 1e6 for each in family]
            samples.append((labelled(task.out), sum(memory[1:]), memory[0]))
        except (psutil.NoSuchProcess, FileNotFoundError):
            pass
        time.sleep(1)
    done = ended(process)
    print(f"  {time.monotonic() - start:.0f} s with imports", flush=True)
    under_way = np.array([sample for sample in samples if 0.1 * count < sample[0] < count])
    later = under_way[under_way[:, 0] > 0.5 * count]
    slopes, later_slopes = (
        {
            name: round(float(np.polyfit(some[:, 0] / 1e6, some[:, i], 1)[0]), 1)
            for i, name in ((1, "engine"), (2, "job"))
        }
        for some in (under_way, later)
    )
    peaks = {name: round(max(sample[i] for sample in samples)) for i, name in ((1, "engine"), (2, "job"))}
    return {
        "messages": count,
        "messages_per_s": round(count / done["seconds"]),
        "samples_under_way": len(under_way),
        "peak_mb": peaks,
        "mb_more_for_each_million_messages": slopes,
        "the_same_in_the_second_half": later_slopes,
        "mb_by_million_messages": [
            [round(float(x), 2) for x in row] for row in under_way[:: len(under_way) // 12 + 1] / (1e6, 1, 1)
        ],
    }


def labelled(out: Path) -> int:
    """Count labels that are committed, without reading what was read before."""
    total = 0
    for file in (out / "_manifest").iterdir():
        if file.name not in _rows_of and file.suffix in (".json", ".jsonl"):
            lines = file.read_text().splitlines()
            _rows_of[file.name] = sum(json.loads(line).get("rows", 0) for line in lines if line.startswith("{"))
        total += _rows_of.get(file.name, 0)
    return total


_rows_of: dict[str, int] = {}


def latency(broker: Broker, scratch: Path, prism: Path, rate: int, seconds: int) -> dict[str, Any]:
    """Measure the time from a message to the file that commits its label, both ways beside each other on one topic."""
    topic, config = f"steady-{rate}", config_file(scratch / f"latency-{rate}", carry=("x", "sent"))
    broker.make_topic(topic, PARTITIONS)
    warm, sent = rows(20, 2), rows(rate * seconds, 3)
    out = config.parent / "labels"
    task = Task(PLAIN, broker.address, topic, len(warm) + len(sent), str(config), WINDOW_S)
    more = ("--window-s", str(WINDOW_S), "--schema", TIMED)
    with streaming(config, *options(broker, topic, config, *more), prism=prism) as process:
        plain = begun(task, prism)
        send(broker.address, topic, warm)
        wait_for(lambda: committed(out) >= len(warm) and list(task.out.glob("*.parquet")), 120)
        first_s = time.time()
        produce(broker, topic, sent, rate)
        last_s = time.time()
        wait_for(lambda: committed(out) >= len(warm) + len(sent), 120)
        ended(plain)
        process.terminate()
        process.wait(60)
    entries = {f"{entry.key}.parquet": out / "_manifest" / f"{entry.key}.json" for entry in read_manifest(out).entries}
    ours = {out / name: entry.stat().st_mtime for name, entry in entries.items()}
    theirs = {file: file.stat().st_mtime for file in task.out.glob("*.parquet")}
    # whole windows of the steady time alone: the last one is closed by the end of the messages
    span = (-(-first_s // WINDOW_S) * WINDOW_S, last_s // WINDOW_S * WINDOW_S)
    figures = {PLAIN: waits(theirs, span), OURS: waits(ours, span)}
    return {"rate": rate, "window_s": WINDOW_S, "windows": round((span[1] - span[0]) / WINDOW_S), **figures}


def waits(files: dict[Path, float], span: tuple[float, float]) -> dict[str, Any]:
    """Give how long messages of a time waited for their commit, and the same from the end of their window on."""
    sent, at = [], []
    for file, committed_s in files.items():
        column = pq.read_table(file, columns=["sent"])["sent"].to_numpy() / 1000
        sent.append(column)
        at.append(np.full(len(column), committed_s))
    sent_s, committed_at = np.concatenate(sent), np.concatenate(at)
    chosen = (sent_s >= span[0]) & (sent_s < span[1])
    from_message = (committed_at - sent_s)[chosen]
    from_window = (committed_at - (sent_s // WINDOW_S + 1) * WINDOW_S)[chosen]
    return {
        "messages": int(chosen.sum()),
        **{
            name: {"median": round(float(np.median(values)), 2), "p99": round(float(np.percentile(values, 99)), 2)}
            for name, values in (("from_the_message_s", from_message), ("from_the_windows_end_s", from_window))
        },
    }


def kept(path: Path | None, about: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Put parts over those that a file holds already, each with the call that measured it."""
    before = json.loads(path.read_text())["results"] if path is not None and path.exists() else {}
    call = {name: about[name] for name in ("date", "command", "load_before")}
    return before | {part: {"call": call, "figures": figures} for part, figures in results.items()}


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few messages")
    parser.add_argument("--parts", nargs="+", default=["deaths", "rate", "far", "latency", "hour"])
    parser.add_argument("--turns", type=int, default=3, help="turns of part rate (3)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.one:
        print(json.dumps(do(Task(**own.one))))
        return
    prism, results = require_prism(), {}
    about = machine(["apache-beam", "confluent-kafka", "pyarrow", "torch"])
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        broker = Broker(scratch / "broker")
        try:
            if "deaths" in own.parts:
                results["deaths"] = deaths(broker, scratch, prism, *((6_000, 300) if own.quick else (30_000, 500)))
                print(json.dumps(results["deaths"]), flush=True)
            if "rate" in own.parts:
                sizes = (10_000, 60_000) if own.quick else (50_000, 400_000)
                results["rate"] = rates(broker, scratch, prism, sizes, 1 if own.quick else own.turns)
                print(json.dumps(results["rate"], indent=1), flush=True)
            if "far" in own.parts:
                sizes = (5_000, 20_000) if own.quick else (20_000, 80_000)
                results["far"] = far(broker, scratch, prism, sizes, 1 if own.quick else own.turns, 0.03)
                print(json.dumps(results["far"], indent=1), flush=True)
            if "latency" in own.parts:
                for rate in (10, 1_000):
                    found = latency(broker, scratch, prism, rate, 15 if own.quick else 60)
                    results.setdefault("latency", []).append(found)
                    print(json.dumps(found, indent=1), flush=True)
            if "hour" in own.parts:
                results["hour"] = hour(broker, scratch, prism, 200_000 if own.quick else 3_600_000)
                print(json.dumps(results["hour"], indent=1), flush=True)
        finally:
            broker.kill()
    write(own.json, about, kept(own.json, about, results))


if __name__ == "__main__":
    main()
