"""Loading soft labels: rows per second from Parquet to batches of tensors, beside the bare scan and other loaders.

    python benchmarks/loading.py --repeats 3 --longest 3    # the whole table, about a quarter of an hour
    python benchmarks/loading.py --quick                # small shards, about two minutes; too short for loaders to fill up
    python benchmarks/loading.py --data DIR --json benchmarks/results/loading.json    # images of CIFAR-10 for the ranks

Two questions. How fast are soft labels read: all loaders take turns, and the best of several turns counts; ours is
compared with the fastest bare scan of the same columns by pyarrow, which makes nothing of them, and with the best
peer. A turn of ours is another epoch of one dataset, as in a training, so that from the second on it has its memory. A
loader that would take longer than --longest seconds is stopped there. A peer that is not installed is left out.
Two threads or processes share two processors as they do in a training: what a loader costs its own processors is given
beside the clock, except for Ray, whose work is done by others. Scans and peers decode with Arrow's own threads, which
OMP_NUM_THREADS numbers; ours decodes in the two threads in which it reads. With as many of Arrow's as there are processors the
scan alone takes them all and leaves none to a shuffle.

What does it cost that every rank reads every window: an epoch of rank 0 of 1, 2, 4 and 8, without and with images to
decode. If reading dominated, the time would stay the same; if a rank's own rows did, it would fall as 1 / ranks.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring.loaders import OURS, PEERS, SCANS, Loader, Shards
from measuring.record import machine, write
from PIL import Image
from rich.console import Console
from rich.table import Table

from distilbeam.inputs.config import InputConfig
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

CASES = {  # rows of a shard, and shards: an epoch takes over a second, beside which filling a pipeline is little
    "top 64 of 1,000": (SoftLabelSpec(1_000, "top_k", 64, teacher="benchmark"), 400_000, 4),
    "10 dense": (SoftLabelSpec(10, teacher="benchmark"), 1_000_000, 16),
    "50 draws of 32,000": (SoftLabelSpec(32_000, "sampled", 50, teacher="benchmark"), 60_000, 24),
}
QUICK_ROWS = {"top 64 of 1,000": 20_000, "10 dense": 200_000}
IMAGE_SHARDS = QUICK_SHARDS = 4
BLOCK_LOGITS = 2**23
WORLD_SIZES = (1, 2, 4, 8)


def make_shards(
    path: Path, spec: SoftLabelSpec, rows: int, shards: int, seed: int, images: pa.Array | None = None
) -> None:
    """Write a dataset of shards with the same labels, of drawn logits, under other identifiers.

    Args:
      path: the dataset.
      spec: of its labels.
      rows: of a shard.
      shards: how many.
      seed: of the logits.
      images: what a column `image` holds, one for each row of all shards.
    """
    labels = _labels(spec, rows, np.random.default_rng(seed))
    for shard in range(shards):
        first = shard * rows
        columns = {"example_id": pa.array(np.arange(first, first + rows).astype(str))}
        columns |= {} if images is None else {"image": images.slice(first, rows)}
        # as one batch, which row groups are cut from
        batch = pa.record_batch(columns | {name: labels[name].chunk(0) for name in labels.column_names})
        write_shard(path, f"shard-{shard:02}", iter([batch]), spec, f"k{shard}")


def _labels(spec: SoftLabelSpec, rows: int, rng: np.random.Generator) -> pa.Table:
    step = max(1, BLOCK_LOGITS // spec.num_classes)
    return pa.Table.from_batches(
        encode(2.5 * rng.standard_normal((min(step, rows - start), spec.num_classes), np.float32), spec)
        for start in range(0, rows, step)
    ).combine_chunks()


def epoch(loader: Loader, shards: Shards, longest_s: float) -> tuple[float, float]:
    """Run a loader once.

    Returns:
      Rows per second, and rows per second of this process on its processors.
    """
    rows, clock, processor = 0, time.perf_counter(), time.process_time()
    for count in loader(shards):
        if count < 0:
            clock, processor = time.perf_counter(), time.process_time()
            continue
        rows += count
        if time.perf_counter() - clock > longest_s:
            break
    return rows / (time.perf_counter() - clock), rows / (time.process_time() - processor)


def compare(shards: Shards, repeats: int, longest_s: float) -> dict[str, Any]:
    """Run all loaders in turns."""
    best: dict[str, tuple[float, float]] = {}
    left_out: dict[str, str] = {}
    for _ in range(repeats):
        for name, loader in {**SCANS, **OURS, **PEERS}.items():
            if name in left_out:
                continue
            try:
                clock, processor = epoch(loader, shards, longest_s)
            except ImportError as e:
                left_out[name] = f"not installed: {e.name}"
                continue
            so_far = best.get(name, (0.0, 0.0))
            best[name] = max(clock, so_far[0]), max(processor, so_far[1])
    scan = max(best[name][0] for name in SCANS)
    ours = best["distilbeam, shuffled"][0]
    # peers that read the Parquet files as we do, and what was prepared beforehand beside what we keep
    prepared = {name for name in PEERS if "Arrow file" in name}
    peers = {name: best[name][0] for name in PEERS if name in best}
    return {
        "rows_per_s": {name: clock for name, (clock, _) in best.items()},
        "rows_per_processor_s": {name: processor for name, (_, processor) in best.items()},
        "left_out": left_out,
        "to_fastest_scan": ours / scan,
        "to_best_peer": ours / max(rate for name, rate in peers.items() if name not in prepared),
        "kept_to_best_prepared_peer": best["distilbeam, kept in memory, shuffled"][0]
        / max([rate for name, rate in peers.items() if name in prepared], default=float("nan")),
    }


def ranks(path: Path, config: InputConfig | None, repeats: int) -> dict[int, float]:
    """Time an epoch of the first of several ranks, in seconds, best of several."""
    found = dict.fromkeys(WORLD_SIZES, float("inf"))
    for _ in range(repeats):
        for world_size in WORLD_SIZES:
            dataset = SoftLabelDataset(path, 256, 0, 0, world_size, input=config, columns=(), cache_bytes=0)
            start = time.perf_counter()
            for _ in dataset:
                pass
            found[world_size] = min(found[world_size], time.perf_counter() - start)
    return found


def cifar(data: Path | None, rows: int) -> pa.Array:
    """Give encoded images of 32 x 32 pixels: CIFAR-10's, or drawn ones."""
    if data is not None:
        return pq.read_table(data / "cifar10-train.parquet", columns=["image"])["image"].combine_chunks()
    rng = np.random.default_rng(0)
    return pa.array([_encoded(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)])


def _encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def show(console: Console, results: dict[str, Any]) -> None:
    """Print the results."""
    for case, found in results["cases"].items():
        table = Table("loader", "rows/s", "of ours", "rows/processor-s", title=case)
        ours = found["rows_per_s"]["distilbeam, shuffled"]
        for name, rate in found["rows_per_s"].items():
            processor = "" if name.startswith("Ray") else f"{found['rows_per_processor_s'][name]:,.0f}"
            table.add_row(name, f"{rate:,.0f}", f"{rate / ours:.2f}", processor)
        console.print(table)
        console.print(
            f"ours to the fastest scan {found['to_fastest_scan']:.2f}, to the best peer {found['to_best_peer']:.2f}; kept "
            f"in memory to the best prepared peer {found['kept_to_best_prepared_peer']:.2f}"
        )
        for name, reason in found["left_out"].items():
            console.print(f"{name} left out, {reason}")
    table = Table("an epoch of rank 0, seconds", *(f"of {size}" for size in WORLD_SIZES))
    for name, seconds in results["ranks"].items():
        table.add_row(name, *(f"{seconds[size]:.2f}" for size in WORLD_SIZES))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shards only")
    parser.add_argument("--data", type=Path, help="directory with cifar10-train.parquet")
    parser.add_argument("--json", type=Path, help="write machine, versions, command and figures to this file")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, help="turns of every loader; 5, and 2 for --quick")
    parser.add_argument("--longest", type=float, help="seconds after which a loader is stopped; 20, and 3 for --quick")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    repeats = arguments.repeats or (2 if arguments.quick else 5)
    longest_s = arguments.longest or (3 if arguments.quick else 20)
    packages = ("numpy", "pyarrow", "torch", "datasets", "grain", "ray")
    about = machine(packages, arrow_threads=pa.cpu_count())  # of OMP_NUM_THREADS; they decode, for all loaders alike
    results: dict[str, Any] = {"cases": {}, "ranks": {}}
    with tempfile.TemporaryDirectory() as directory:
        for case, (spec, rows, shards) in CASES.items():
            if arguments.quick and case not in QUICK_ROWS:
                continue
            size = (QUICK_ROWS[case], QUICK_SHARDS) if arguments.quick else (rows, shards)
            path = Path(directory) / spec.kind
            make_shards(path, spec, *size, arguments.seed)
            columns = tuple(name for name in pq.read_schema(path / "shard-00.parquet").names if name != "example_id")
            results["cases"][case] = compare(Shards(path, columns, arguments.batch_size), repeats, longest_s)
        spec = SoftLabelSpec(10, teacher="benchmark", carried=("image",))
        images = cifar(arguments.data, 2_000 if arguments.quick else 20_000)
        size = (len(images) // IMAGE_SHARDS, IMAGE_SHARDS)
        make_shards(Path(directory) / "images", spec, *size, arguments.seed, images)
        config = InputConfig(kind="image", columns=("image",))
        results["ranks"]["64 labels of 1,000 classes"] = ranks(Path(directory) / "top_k", None, repeats)
        results["ranks"]["10 labels and an image to decode"] = ranks(Path(directory) / "images", config, repeats)
    show(Console(width=120), results)
    write(arguments.json, about, results)


if __name__ == "__main__":
    main()
