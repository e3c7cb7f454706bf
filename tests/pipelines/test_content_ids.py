from __future__ import annotations

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.content_ids import content_ids


def table() -> pa.Table:
    return pa.table(
        {
            "text": ["a", "b", "a", None],
            "number": [1, 2, 1, 1],
            "list": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float32) % 4), 2),
            "blob": pa.array([b"xy", b"zz", b"xy", b"xy"], pa.binary(2)),
            "nested": [[1, 2], [3], [1, 2], []],
        }
    )


def test_equal_content_has_one_id() -> None:
    ids = content_ids(table())
    assert [len(i) for i in ids] == [16] * 4
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3


def test_ids_do_not_depend_on_chunks_offsets_or_batches() -> None:
    whole = content_ids(table())
    assert content_ids(pa.concat_tables([table().slice(0, 1), table().slice(1)])) == whole
    assert content_ids(table().slice(2)) == whole[2:]


def test_names_types_and_borders_count() -> None:
    base = content_ids(pa.table({"a": ["xy"], "b": ["z"]}))
    assert content_ids(pa.table({"a": ["x"], "b": ["yz"]})) != base
    assert content_ids(pa.table({"a": ["xy"], "c": ["z"]})) != base
    assert content_ids(pa.table({"a": pa.array([1], pa.int32())})) != content_ids(
        pa.table({"a": pa.array([1], pa.int64())})
    )


def test_known_value() -> None:
    # printf 'a:int64\x08\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0' | b2sum -l 128
    assert content_ids(pa.table({"a": [7]}))[0].hex() == "9c992387e6ba2e261746bfa4976b917a"
