"""A bit that changes in a shard is found when the shard is read, or changes nothing that is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.student.data.row_groups import open_datasets
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, read_manifest, write_shard
from distilbeam.teacher.softlabels.verify import verify_labels

ROWS, CLASSES = 40, 5


@pytest.fixture(params=["dense", "sampled"])
def shard(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    rng = np.random.default_rng(0)
    k = None if request.param == "dense" else 3
    spec = SoftLabelSpec(num_classes=CLASSES, kind=request.param, k=k, carried=("x",))
    labels = encode(rng.normal(size=(ROWS, CLASSES)).astype(np.float32), spec, rng=np.random.default_rng(1))
    columns = {"example_id": pa.array([f"row {i}" for i in range(ROWS)]), "x": pa.array(rng.normal(size=ROWS))}
    columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
    write_shard(tmp_path, "a", pa.table(columns), spec, "a")
    return tmp_path / "a.parquet"


def read(directory: Path) -> pa.Table:
    (groups,) = open_datasets([directory]).groups
    columns = groups[0].file.schema.names
    return pa.concat_tables(group.read(columns) for group in groups)


def test_every_flipped_bit_is_found_or_changes_nothing(shard: Path) -> None:
    good, expected = shard.read_bytes(), read(shard.parent)
    places = np.random.default_rng(2).choice(8 * len(good), 600, replace=False)
    found = 0
    for place in places.tolist():
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        shard.write_bytes(damaged)
        try:
            same = read(shard.parent).equals(expected)
        except ValueError:
            found += 1
        else:
            assert same, f"bit {place} changed what is read"
    assert found > 500
    shard.write_bytes(good)
    assert read(shard.parent).equals(expected)


def test_the_message_says_what_to_do(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[60] ^= 4
    shard.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a\.parquet is damaged .*: its bytes changed after it was committed; take it out"
    ):
        read(shard.parent)
    assert not verify_labels(shard.parent).ok


def test_datasets_of_former_versions_have_no_such_checksum(shard: Path) -> None:
    from dataclasses import replace

    from distilbeam.teacher.softlabels.manifest import write_entry

    (entry,) = read_manifest(shard.parent).entries
    write_entry(shard.parent, replace(entry, footer=""))
    assert read(shard.parent).num_rows == ROWS
