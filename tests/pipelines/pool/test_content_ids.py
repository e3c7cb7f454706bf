from __future__ import annotations

import datetime
import decimal
import hashlib

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.pipelines.pool.content_ids import content_ids


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


def ids_of(values: pa.Array | pa.ChunkedArray) -> list[bytes]:
    return content_ids(pa.table({"a": values}))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string(), "x"),
        (pa.int64(), 3),
        (pa.float32(), 0.5),
        (pa.bool_(), True),
        (pa.binary(2), b"ab"),
        (pa.list_(pa.float32(), 2), [1.0, 2.0]),
        (pa.list_(pa.int32()), [1, 2]),
        (pa.struct([("b", pa.int8())]), {"b": 1}),
        (pa.dictionary(pa.int32(), pa.string()), "x"),
        (pa.time64("us"), datetime.time(1, 2)),
        (pa.decimal128(5, 2), decimal.Decimal("1.50")),
    ],
)
def test_an_id_is_a_function_of_the_row_alone(kind: pa.DataType, value: object) -> None:
    alone = ids_of(pa.array([value], kind))[0]
    beside_null, null = ids_of(pa.array([value, None], kind))
    assert beside_null == alone
    assert null == ids_of(pa.array([None], kind))[0] != alone
    assert ids_of(pa.array([None, value, None, value], kind).slice(1)) == [alone, null, alone]
    assert ids_of(pa.chunked_array([pa.array([None], kind), pa.array([value], kind)])) == [null, alone]


def test_a_missing_item_of_a_vector_changes_that_vector_alone() -> None:
    kind = pa.list_(pa.int32(), 2)
    alone = ids_of(pa.array([[1, 2]], kind))[0]
    ids = ids_of(pa.array([[1, 2], [1, None], [1, 0], None], kind))
    assert ids[0] == alone
    assert len(set(ids)) == 4


def test_encodings_of_one_value_have_one_id() -> None:
    text = ids_of(pa.array(["x", "y"]))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        assert ids_of(pa.array(["x", "y"]).cast(kind)) == text
    assert ids_of(pa.array([b"x"], pa.large_binary())) == ids_of(pa.array([b"x"]))
    named = [pa.array([[1]], pa.list_(pa.field(name, pa.int64()))) for name in ("item", "element")]
    assert ids_of(named[0]) == ids_of(named[1]) == ids_of(pa.array([[1]], pa.large_list(pa.int64())))
    assert text != ids_of(pa.array([b"x", b"y"])), "text and bytes are not the same"
    assert content_ids(pa.table({"a": [1], "b": ["x"]})) == content_ids(pa.table({"b": ["x"], "a": [1]}))


def test_all_nan_are_one_value() -> None:
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FC00001], np.uint32)
    assert len(set(ids_of(pa.array(bits.view(np.float32))))) == 1
    assert ids_of(pa.array([0.5, float("nan")]))[0] == ids_of(pa.array([0.5]))[0]


def test_what_has_no_missing_value_keeps_the_id_it_had() -> None:
    """As version 0.1 computed them before missing values were looked at."""
    vector = pa.FixedSizeListArray.from_arrays(
        pa.array(np.arange(2, dtype=np.float32)), type=pa.list_(pa.field("element", pa.float32()), 2)
    )
    # printf 'a:fixed_size_list<element: float>[2]\x08\0\0\0\0\0\0\0\0\0\0\0\0\0\x80\x3f' | b2sum -l 128
    expected = hashlib.blake2b(b"a:fixed_size_list<element: float>[2]", digest_size=16)
    expected.update((8).to_bytes(8, "little") + np.arange(2, dtype=np.float32).tobytes())
    assert ids_of(vector) == [expected.digest()]
