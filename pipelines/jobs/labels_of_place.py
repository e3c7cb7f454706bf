"""The soft labels that a place stands for: a dataset's own, or those of a run's or a labelling job's directory, by their use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.pool.content_ids import content_ids
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.settings import read_toml
from distilbeam.storage.paths import is_remote
from distilbeam.teacher.softlabels.class_columns import ID, ROW
from distilbeam.teacher.softlabels.manifest import FOLDER, read_manifest

_ABOVE = 2  # folders between a round's labels and the run


def splits_of(place: str) -> dict[str, list[str]]:
    """Find the labels of a place.

    Args:
      place: a soft-label dataset, or the directory of a run or a labelling job.

    Returns:
      Names of splits and the datasets of each: `train`, and of a run also `validation` and `test`, the teacher's answers for
      these sets.

    Raises:
      ValueError: a directory without labels.
    """
    root = Path(place)
    if is_remote(place) or (root / FOLDER).is_dir():
        return {"train": [place]}
    if (root / "labels" / FOLDER).is_dir():  # a labelling job
        return {"train": [str(root / "labels")]}
    where = RunDirectory(root)
    bought = [str(path) for path in sorted((root / "labels").glob("round=???")) if where.summary(path).exists()]
    if not bought:
        raise ValueError(
            f"{place} has no soft labels: name a dataset, such as run/labels/round=000, or the directory of a run or a "
            "labelling job"
        )
    asked = {name: where.asked(name) for name in ("validation", "test")}
    return {"train": bought, **{name: [str(path)] for name, path in asked.items() if where.summary(path).exists()}}


def id_of(place: str) -> str:
    """Find the name of the user's column of ids: `data.id` of the run or the job that a place is or lies in, else `example_id`."""
    root = Path(place).absolute()
    for directory in () if is_remote(place) else (root, *list(root.parents)[:_ABOVE]):
        if (directory / "config.toml").exists():
            return str(read_toml(directory / "config.toml").get("data", {}).get("id") or ID)
    return ID


def ids_of_sets(place: str, splits: Mapping[str, Sequence[str]]) -> dict[str, pa.Array]:
    """Read the user's ids of a run's validation and test set, whose answers have the hashes of the rows' content instead.

    Args:
      place: the directory of the run.
      splits: as `splits_of` gives them.

    Returns:
      By split, the ids as texts, a row of the set each. A split is left out where the set has no such column, is not where it was, or
      has other rows now.
    """
    if is_remote(place) or not (Path(place) / "config.toml").exists():
        return {}
    config, root = read_toml(Path(place) / "config.toml"), Path(place).absolute()
    data, directory = config.get("data", {}), Path(config.get("run", {}).get("directory", ""))
    folder = root.parents[len(directory.parts) - 1] if directory.parts else root  # which the settings' paths start at
    found = {}
    for split in ("validation", "test"):
        if split in splits and data.get("id") and data.get(split):
            ids = _ids_of_set(folder / data[split], data["id"], splits[split][0])
            if ids is not None:
                found[split] = ids
    return found


def _ids_of_set(where: Path, column: str, answers: str) -> pa.Array | None:
    manifest = read_manifest(answers)
    carried = list(manifest.spec.carried)
    try:
        table = pa.concat_tables(
            pq.read_table(path, columns=list(dict.fromkeys([column, *carried])), partitioning=None)
            for path in find_files(where)
        )
    except (ValueError, OSError, pa.ArrowException):
        return None
    if not {column, *carried} <= set(table.column_names):
        return None
    now = content_ids(table.select(carried))
    for path in manifest.paths():
        rows = pq.read_table(path, columns=[ID, ROW])
        if any(
            row >= len(now) or now[row] != one for one, row in zip(*map(pa.ChunkedArray.to_pylist, rows), strict=True)
        ):
            return None
    return pc.cast(table[column].combine_chunks(), pa.string())
