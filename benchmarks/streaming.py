"""The streaming job on a real broker and real Prism: what is lost when everything dies, and how fast it is beside a plain loop.

    python benchmarks/streaming.py --quick
    python benchmarks/streaming.py --json benchmarks/results/streaming.json

It needs the development environment, Java 17, a Kafka broker (KAFKA_JARS) and Prism (PRISM or the PATH); see `tests/support/engines.py`.

Part `deaths`: messages on four partitions at a rate, while the job is killed (kill -9) twice and the broker once; then every
message must be labelled once, with the values that a batch job gives. Part `rate`: a topic that is full already, its messages'
times spread over an hour; the rate is that of the messages between two sizes, so that starts cost nothing on either side. Part
`latency`: the time from a message's own to that of the entry that commits its label, at steady rates. The plain loop is
confluent-kafka's, the same teacher and codec, a Parquet file a window: what a person would write, without a dead letter, an
offset or a restart. Both ways take turns.
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
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import numpy as np
import psutil
import tomli_w
from engines import SCHEMA, Broker, labels_in, require_prism, rows, send, streaming, wait_for
from measuring.record import machine, write

from distilbeam.teacher.softlabels import decode, read_manifest

WINDOW_S = 5
PARTITIONS = 4


def config_file(folder: Path) -> Path:
    """Write the configuration of a labelling job whose teacher keeps a log of what it is asked."""
    folder.mkdir(parents=True)
    teacher = {
        "kind": "torch",
        "model": "logging_teacher:LoggingTeacher",
        "arguments": {"log": str(folder / "asked.log")},
        "input": {"columns": ["x"]},
    }
    data = {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": 3}
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps({"run": {"directory": "batch"}, "data": data, "teacher": teacher}))
    return path


def options(broker: Broker, topic: str, config: Path, *more: str) -> list[str]:
    """Give the options of a streaming job."""
    source = ["--source", f"kafka:{broker.address}:{topic}", "--schema", SCHEMA, "--out", str(config.parent / "labels")]
    return [*source, *more]


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


def rates(broker: Broker, scratch: Path, prism: Path, sizes: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    """Measure the rate of both ways on topics that are full."""
    hour_ms = int(time.time() * 1000) - 3_600_000
    for count in sizes:
        broker.make_topic(f"full-{count}", PARTITIONS)
        sent = rows(count)
        messages = [
            {"message": {"value": row, "timestamp": hour_ms + 3_500_000 * i // count}} for i, row in enumerate(sent)
        ]
        for i in range(0, count, 50_000):
            send(broker.address, f"full-{count}", messages[i : i + 50_000])
    seconds: dict[str, dict[int, list[float]]] = {}
    peaks: dict[str, dict[int, list[float]]] = {}
    for turn in range(repeats):
        for way in ("plain loop", "distilbeam"):
            for count in sizes:
                folder = scratch / f"rate-{turn}-{way.replace(' ', '-')}-{count}"
                done = one(way, broker, f"full-{count}", count, config_file(folder), prism)
                seconds.setdefault(way, {}).setdefault(count, []).append(done["seconds"])
                peaks.setdefault(way, {}).setdefault(count, []).append(done["peak_mb"])
                print(f"  {way:12} {count:9,} messages {done['seconds']:7.2f} s {done['peak_mb']:7.0f} MB", flush=True)
    found = []
    for way, by_size in seconds.items():
        small, large = (statistics.median(by_size[count]) for count in sizes)
        memory = [round(statistics.median(peaks[way][count])) for count in sizes]
        found.append({"way": way, "messages_per_s": round((sizes[1] - sizes[0]) / (large - small)), "peak_mb": memory})
    found[1]["of_plain"] = round(found[1]["messages_per_s"] / found[0]["messages_per_s"], 3)
    return found


def one(way: str, broker: Broker, topic: str, count: int, config: Path, prism: Path) -> dict[str, float]:
    """Run one way over a full topic in a process of its own; its peak memory is the largest sum of all its processes."""
    arguments = {"address": broker.address, "topic": topic, "count": count, "config": str(config), "prism": str(prism)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRISM": str(prism)}
    command = [sys.executable, __file__, "--one", way, "--arguments", json.dumps(arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    assert process.stdout is not None
    done: dict[str, float] = json.loads(process.stdout.read().splitlines()[-1])
    return {**done, "peak_mb": peak / 1e6}


def plain_loop(address: str, topic: str, count: int, config: Path, window_s: float) -> None:
    """Read, ask and write as one would by hand: a Parquet file a window, written when a later one has begun everywhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from confluent_kafka import Consumer

    from distilbeam.pipelines.config import load_any_config
    from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
    from distilbeam.pipelines.streaming.pipeline import spec_of
    from distilbeam.teacher.softlabels import encode

    settings = load_any_config(config)
    teacher = cached_teacher(teacher_text(settings.teacher, ()))
    spec = spec_of(settings)
    out = config.parent / "plain"
    out.mkdir()
    options_ = {"group.id": "plain", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    consumer = Consumer({"bootstrap.servers": address, **options_})
    consumer.subscribe([topic])
    windows: dict[float, list[Any]] = {}
    newest: dict[int, float] = {}
    done = 0
    while done < count:
        by_window: dict[float, list[dict[str, Any]]] = {}
        messages = consumer.consume(256, 0.1)
        for message in messages:
            at = message.timestamp()[1] / 1000
            newest[message.partition()] = max(newest.get(message.partition(), 0.0), at)
            by_window.setdefault(at // window_s, []).append(json.loads(message.value()))
        for window, group in by_window.items():
            x = np.array([row["x"] for row in group], np.float32)
            batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 4)})
            labels = encode(np.asarray(teacher.logits(batch), np.float32), spec)
            columns = {"example_id": pa.array([row["key"] for row in group]), "x": batch["x"]}
            columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
            windows.setdefault(window, []).append(pa.table(columns))
            done += len(group)
        complete = min(newest.values(), default=0.0) // window_s if len(newest) == PARTITIONS else 0.0
        if not messages:  # all partitions are idle
            complete = (time.time() - 2) // window_s
        for window in [w for w in windows if w < complete or done >= count]:
            pq.write_table(
                pa.concat_tables(windows.pop(window)), out / f"{window:.0f}-{done}.parquet", compression="zstd"
            )
    consumer.close()


def run_one(way: str, arguments: dict[str, Any]) -> None:
    """Do one way in this process and print its seconds."""
    config = Path(arguments["config"])
    if way == "plain loop":
        start = time.perf_counter()
        plain_loop(arguments["address"], arguments["topic"], arguments["count"], config, 60)
    else:
        from distilbeam.pipelines.config import load_any_config
        from distilbeam.pipelines.streaming.job import StreamJob
        from distilbeam.pipelines.streaming.settings import StreamSettings

        source = f"kafka:{arguments['address']}:{arguments['topic']}"
        settings = StreamSettings(source, str(config.parent / "labels"), SCHEMA, until="latest")
        start = time.perf_counter()
        state = StreamJob(load_any_config(config), settings).run()
        assert state.labels == arguments["count"], f"{state.labels:,} labels of {arguments['count']:,} messages"
    print(json.dumps({"seconds": time.perf_counter() - start}))


def latency(broker: Broker, scratch: Path, prism: Path, rate: int, seconds: int) -> dict[str, Any]:
    """Measure the time from a message to the entry that commits its label, once the job is under way."""
    topic, config = f"steady-{rate}", config_file(scratch / f"latency-{rate}")
    broker.make_topic(topic, PARTITIONS)
    out = config.parent / "labels"
    warm, sent = rows(20, 2), rows(rate * seconds, 3)
    more = ("--window-s", str(WINDOW_S))
    with streaming(config, *options(broker, topic, config, *more), prism=prism) as process:
        send(broker.address, topic, warm)
        wait_for(lambda: committed(out) >= len(warm), 120)
        asked_before = len((config.parent / "asked.log").read_text().split())
        produce(broker, topic, sent, rate)
        wait_for(lambda: committed(out) >= len(warm) + len(sent), 120)
        process.terminate()
        process.wait(60)
    waits = []
    for entry in read_manifest(out).entries:
        at = (out / "_manifest" / f"{entry.key}.json").stat().st_mtime
        end_s = _window_start_s(entry.extra["window"]) + WINDOW_S
        waits += [at - end_s] * entry.rows
    assert asked_before == len(warm)
    return {
        "rate": rate,
        "window_s": WINDOW_S,
        "from_the_windows_end_to_its_commit_s": {
            "median": round(statistics.median(waits), 2),
            "p99": round(float(np.percentile(waits, 99)), 2),
        },
    }


def _window_start_s(name: str) -> float:
    from datetime import UTC, datetime

    text = name.split("-")[0]
    return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few messages")
    parser.add_argument("--parts", nargs="+", default=["deaths", "rate", "latency"])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.one:
        run_one(own.one, own.arguments)
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
                sizes = (10_000, 30_000) if own.quick else (100_000, 300_000)
                results["rate"] = rates(broker, scratch, prism, sizes, 1 if own.quick else 3)
                print(json.dumps(results["rate"]), flush=True)
            if "latency" in own.parts:
                for rate in (10, 1_000):
                    found = latency(broker, scratch, prism, rate, 10 if own.quick else 60)
                    results.setdefault("latency", []).append(found)
                    print(json.dumps(found), flush=True)
        finally:
            broker.kill()
    write(own.json, about, results)


if __name__ == "__main__":
    main()
