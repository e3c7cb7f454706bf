"""Pools and teachers of the size that a benchmark wants."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

LAYOUTS = ("fixed_size_binary", "fixed_size_list", "flat", "binary")


def write_pool(
    directory: Path, rows: int, features: int = 64, files: int = 16, layout: str = LAYOUTS[0], group_rows: int = 62_500
) -> tuple[Path, list[str]]:
    """Write normally distributed float32 features with ids.

    Args:
      directory: where; what is there already is kept.
      rows: number of rows.
      features: number of features.
      files: number of files.
      layout: how the features are stored: raw bytes of fixed size, lists of fixed size, a column each, or raw bytes.
      group_rows: rows of a row group.

    Returns:
      The directory, and the columns that hold the features.
    """
    columns = ["x"] if layout != "flat" else [f"x{i}" for i in range(features)]
    directory.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, rows, files + 1).astype(int)
    for number, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        path = directory / f"{number:05d}.parquet"
        if not path.exists():
            _write_file(path, range(start, stop), features, layout, group_rows)
    return directory, columns


class Teacher(torch.nn.Module):
    """A linear teacher: cheap, so that the engine is what is measured, or one that waits at each call, as a remote one would."""

    def __init__(self, features: int, classes: int, seconds: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(features, classes)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Wait and answer."""
        if self.seconds:
            time.sleep(self.seconds)
        logits: torch.Tensor = self.linear(x)
        return logits


def _write_file(path: Path, rows: range, features: int, layout: str, group_rows: int) -> None:
    schema, writer = None, None
    for start in range(rows.start, rows.stop, group_rows):
        stop = min(start + group_rows, rows.stop)
        values = np.random.default_rng(start).standard_normal((stop - start, features), np.float32)
        table = pa.table({"id": np.arange(start, stop).astype(str), **_columns(values, layout)})
        if writer is None:
            schema = table.schema
            writer = pq.ParquetWriter(path, schema, compression="none", use_dictionary=False)
        writer.write_table(table, row_group_size=group_rows)
    if writer is not None:
        writer.close()


def _columns(values: np.ndarray, layout: str) -> dict[str, pa.Array]:
    rows, features = values.shape
    match layout:
        case "fixed_size_binary":
            data = pa.py_buffer(values.tobytes())
            return {"x": pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * features), rows, [None, data])}
        case "fixed_size_list":
            return {"x": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), features)}
        case "binary":
            return {"x": pa.array([row.tobytes() for row in values], pa.binary())}
        case "flat":
            return {f"x{i}": pa.array(np.ascontiguousarray(values[:, i])) for i in range(features)}
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
