"""Soft labels: bytes per row, and rows encoded and decoded per second, beside other layouts of the same numbers.

    python benchmarks/softlabels.py                                       # the whole table, about three minutes
    python benchmarks/softlabels.py --quick                               # small shapes, about ten seconds
    python benchmarks/softlabels.py --json benchmarks/results/softlabels.json

Every logit is drawn anew, so that nothing repeats for a codec to find. Each layout holds the same rows in one Parquet
file in memory: what is kept of the teacher's distribution, without ids or features. Everything runs on one thread, and
times are seconds of the process on the processor, which a busy machine disturbs less than the clock; they are the least
of several runs. Decoding, which includes the scan, is compared with a bare scan of the same columns, the two taken in
turns; the file has the row groups of a shard, and both read one after the other, as training does.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring.record import machine, write
from rich.console import Console
from rich.table import Table

from distilbeam.teacher.softlabels import SoftLabelSpec, decode, encode
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, MARGIN, TAIL, parquet_options
from distilbeam.teacher.softlabels.shards import ROW_GROUP_BYTES

ROWS = {10: 400_000, 1_000: 40_000, 32_000: 16_000, 150_000: 8_000}
QUICK_ROWS = {10: 40_000, 1_000: 4_000, 32_000: 2_000}
KEPT = (10, 64, 128)
DRAWS = 50
BLOCK_LOGITS = 2**22
SHORTEST_S = 0.05


def logits(classes: int, rows: int, seed: int) -> Iterator[np.ndarray]:
    """Draw float32 logits in blocks: a few classes stand out of many, as in a trained classifier."""
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK_LOGITS // classes)
    for start in range(0, rows, step):
        yield 2.5 * rng.standard_normal((min(step, rows - start), classes), np.float32)


def labels(spec: SoftLabelSpec, rows: int, seed: int) -> tuple[pa.Table, float]:
    """Encode all rows; return the table and the seconds that encoding took."""
    seconds, batches = 0.0, []
    encode(next(logits(spec.num_classes, 64, seed)), spec)  # the first call loads what the others share
    for block in logits(spec.num_classes, rows, seed):
        start = time.process_time()
        batches.append(encode(block, spec, rng=np.random.default_rng(seed)))
        seconds += time.process_time() - start
    return pa.Table.from_batches(batches).combine_chunks(), seconds


def parquet(table: pa.Table, **options: Any) -> bytes:
    """Write a table to memory."""
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def half(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.float16))


def layouts(table: pa.Table, spec: SoftLabelSpec, exact: np.ndarray) -> dict[str, int]:
    """Return the size in bytes of each layout of the same rows; `exact` are the log-probabilities before rounding."""
    found = decode(table, spec)
    shape = found.logprobs.shape
    classes = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape) if found.classes is None else found.classes
    others = {name: table[name] for name in (TAIL, MARGIN) if name in table.column_names}
    flat = {f"p{i}": half(found.logprobs[:, i]) for i in range(shape[1])}
    flat |= {f"c{i}": pa.array(classes[:, i]) for i in range(shape[1]) if found.classes is not None}
    flat_table = pa.table({**flat, **others})
    items = pa.StructArray.from_arrays([pa.array(classes.ravel()), pa.array(exact.ravel())], ["class", "logprob"])
    offsets = pa.array(np.arange(0, exact.size + 1, shape[1], dtype=np.int32))
    plain = {LOGPROBS: pa.FixedSizeListArray.from_arrays(pa.array(exact.ravel()), shape[1])}
    plain |= {CLASSES: table[CLASSES]} if found.classes is not None else {}
    compact = storage(table, spec, "float16")
    return {
        "default": len(parquet(table, **parquet_options(table.schema))),
        "compact": len(parquet(compact, **parquet_options(compact.schema))),
        "columns float16": len(parquet(flat_table, **parquet_options(flat_table.schema))),
        "lists float16": len(parquet(compact, **reference_options())),
        "plain snappy": len(parquet(pa.table({**plain, **others}))),
        "nested lists": len(parquet(pa.table({"items": pa.ListArray.from_arrays(offsets, items), **others}))),
    }


def storage(table: pa.Table, spec: SoftLabelSpec, kind: Any) -> pa.Table:
    """Store the same labels in another type."""
    values = table[LOGPROBS].combine_chunks().flatten().to_numpy().astype(kind)
    element = pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=pa.list_(element, spec.width))
    return table.set_column(table.column_names.index(LOGPROBS), LOGPROBS, column)


def reference_options() -> dict[str, Any]:
    """Store float16 with BYTE_STREAM_SPLIT and zstd, and leave everything else to the writer."""
    return {
        "compression": "zstd",
        "use_dictionary": False,
        "column_encoding": {f"{LOGPROBS}.list.element": "BYTE_STREAM_SPLIT"},
    }


def best_of_both(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Time two functions in turns, each often enough to be measured; return the least seconds of a call of each."""
    start = time.process_time()
    first()
    second()
    calls = 1 + int(SHORTEST_S / (time.process_time() - start))
    least = [float("inf"), float("inf")]
    for _ in range(repeats):
        for i, work in enumerate((first, second)):
            start = time.process_time()
            for _ in range(calls):
                work()
            least[i] = min(least[i], (time.process_time() - start) / calls)
    return least[0], least[1]


def measure(spec: SoftLabelSpec, rows: int, seed: int, repeats: int) -> dict[str, Any]:
    """Measure one shape."""
    table, encoding_s = labels(spec, rows, seed)
    exact = np.concatenate(
        [_exact(block, spec, table, start) for start, block in _numbered(logits(spec.num_classes, rows, seed))]
    )
    sizes = (
        layouts(table, spec, exact)
        if spec.kind != "sampled"
        else {"default": len(parquet(table, **parquet_options(table.schema)))}
    )
    wanted = [name for name in (LOGPROBS, CLASSES, TAIL) if name in table.column_names]
    group = max(1, ROW_GROUP_BYTES * rows // table.nbytes)
    data = pa.py_buffer(parquet(table, row_group_size=group, **parquet_options(table.schema)))

    def scan() -> Iterator[pa.Table]:
        file = pq.ParquetFile(pa.BufferReader(data))
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=wanted, use_threads=False)

    def scanned() -> None:
        for _ in scan():
            pass

    def decoded() -> None:
        for read in scan():
            decode(read, spec)

    scan_s, decode_s = best_of_both(scanned, decoded, repeats)
    float16 = min(size for name, size in sizes.items() if "float16" in name or len(sizes) == 1)
    return {
        "classes": spec.num_classes,
        "kind": spec.kind,
        "k": spec.width,
        "rows": rows,
        "bytes_per_row": {name: size / rows for name, size in sizes.items()},
        "encoded_rows_per_s": rows / encoding_s,
        "encoded_logits_per_s": rows * spec.num_classes / encoding_s,
        "scanned_rows_per_s": rows / scan_s,
        "decoded_rows_per_s": rows / decode_s,
        "default_to_float16": sizes["default"] / float16,
        "compact_to_float16": sizes.get("compact", sizes["default"]) / float16,
        "decode_to_scan": scan_s / decode_s,
    }


def _numbered(blocks: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for block in blocks:
        yield start, block
        start += len(block)


def _exact(block: np.ndarray, spec: SoftLabelSpec, table: pa.Table, start: int) -> np.ndarray:
    """Return the unrounded float32 log-probabilities of the kept classes."""
    highest = block.max(axis=1, keepdims=True)
    logprobs = block - highest - np.log(np.exp(block - highest).sum(axis=1, keepdims=True))
    found = decode(table.slice(start, len(block)), spec)
    return logprobs if found.classes is None else np.take_along_axis(logprobs, np.maximum(found.classes, 0), axis=1)


def shapes(quick: bool) -> Iterator[tuple[SoftLabelSpec, int]]:
    """List what is measured, with the number of rows."""
    for classes, rows in (QUICK_ROWS if quick else ROWS).items():
        if classes <= 1_000:
            yield SoftLabelSpec(classes), rows
        for k in KEPT:
            if k <= classes:
                yield SoftLabelSpec(classes, "top_k", k), rows
        yield SoftLabelSpec(classes, "sampled", DRAWS), rows


def show(results: list[dict[str, Any]]) -> Table:
    """Lay the results out."""
    names = ["default", "compact", "lists float16", "columns float16", "plain snappy", "nested lists"]
    table = Table(
        "C",
        "kind",
        "k",
        *(f"{name}\nB/row" for name in names),
        "default/\nfloat16",
        "encode\nrows/s",
        "decode\nrows/s",
        "decode/\nscan",
    )
    for r in results:
        sizes = [f"{r['bytes_per_row'][name]:,.1f}" if name in r["bytes_per_row"] else "" for name in names]
        ratio = f"{r['default_to_float16']:.3f}" if len(r["bytes_per_row"]) > 1 else ""
        rates = [f"{r['encoded_rows_per_s']:,.0f}", f"{r['decoded_rows_per_s']:,.0f}", f"{r['decode_to_scan']:.3f}"]
        table.add_row(f"{r['classes']:,}", r["kind"], str(r["k"]), *sizes, ratio, *rates)
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--json", type=Path, help="write machine, versions, command and figures to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions of scan and decode")
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    results = [measure(spec, rows, arguments.seed, arguments.repeats) for spec, rows in shapes(arguments.quick)]
    Console(width=150).print(show(results))
    write(arguments.json, machine(("numpy", "pyarrow")), results)


if __name__ == "__main__":
    main()
