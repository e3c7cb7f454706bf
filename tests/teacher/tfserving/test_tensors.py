"""Arrays to TensorProto and back, against TensorFlow's own reading of the format."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.tensors import as_type, to_array, to_proto, type_number

DTYPES = [
    np.float16,
    np.float32,
    np.float64,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.bool_,
]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_numbers_round_trip(array: np.ndarray) -> None:
    back = to_array(to_proto(array))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@given(hnp.arrays(object, SHAPES, elements=st.binary(max_size=6)))
def test_bytes_round_trip(array: np.ndarray) -> None:
    back = to_array(to_proto(array))
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()


def test_text_is_sent_as_utf8() -> None:
    assert to_array(to_proto(np.array(["ö", "b"], object))).tolist() == ["ö".encode(), b"b"]


def test_big_endian_and_strided_arrays_are_sent_right() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(to_array(to_proto(array)), array)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": 1, "float_val": [1.5]}, [1.5, 1.5, 1.5]),  # one value stands for all
        ({"dtype": 1, "float_val": [1.0, 2.0]}, [1.0, 2.0, 2.0]),
        ({"dtype": 3, "int_val": [1, -2, 3]}, [1, -2, 3]),
        ({"dtype": 4, "int_val": [255, 0, 1]}, [255, 0, 1]),
        ({"dtype": 9, "int64_val": [2**40, 0, 1]}, [2**40, 0, 1]),
        ({"dtype": 10, "bool_val": [True, False, True]}, [True, False, True]),
        ({"dtype": 19, "half_val": np.array([1.5, -2, 0], np.float16).view(np.uint16).tolist()}, [1.5, -2, 0]),
        ({"dtype": 14, "half_val": np.array([1.5, -2, 0], ml_dtypes.bfloat16).view(np.uint16).tolist()}, [1.5, -2, 0]),
    ],
)
def test_values_one_by_one_are_read(fields: dict[str, Any], expected: list[Any]) -> None:
    proto = load_messages().tensor(**fields)
    proto.tensor_shape.dim.add(size=3)
    np.testing.assert_array_equal(to_array(proto), expected)


def test_bfloat16_content_becomes_float32() -> None:
    values = np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16)
    proto = load_messages().tensor(dtype=14, tensor_content=values.tobytes())
    proto.tensor_shape.dim.add(size=3)
    back = to_array(proto)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, values.astype(np.float32))


def test_what_cannot_be_read_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"tensors of type number 8 \(types.proto\) cannot be read"):
        to_array(load_messages().tensor(dtype=8))
    proto = to_proto(np.zeros(3, np.float32))
    proto.tensor_shape.dim[0].size = 4
    with pytest.raises(ValueError, match=r"a tensor of shape \[4\] must have 4 values, got 3"):
        to_array(proto)
    with pytest.raises(ValueError, match="an input tensor must be numbers, text or bytes, got complex64"):
        to_proto(np.zeros(2, np.complex64))


def test_inputs_are_converted_to_the_signature_s_type() -> None:
    assert as_type(np.array([1.7]), 9).dtype == np.int64
    assert as_type(np.array([1.7]), 19).dtype == np.float16
    assert as_type(np.array([b"a"], object), 1).dtype == object


@pytest.mark.slow
def test_tensorflow_agrees_on_numbers_and_types() -> None:
    code = """
import json, sys
import numpy as np, tensorflow as tf
from distilbeam.teacher.tfserving.tensors import to_array, to_proto
out = {}
for name in json.loads(sys.argv[1]):
    array = np.arange(-3, 3).astype(name).reshape(2, 3)
    assert np.array_equal(tf.make_ndarray(to_proto(array)), array), name
    assert np.array_equal(to_array(tf.make_tensor_proto(array)), array), name
    out[name] = tf.as_dtype(name).as_datatype_enum
assert tf.make_ndarray(to_proto(np.array([b"a", b""], object))).tolist() == [b"a", b""]
print(json.dumps(out))
"""
    names = [np.dtype(dtype).name for dtype in DTYPES]
    run = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {name: type_number(np.dtype(name)) for name in names}
