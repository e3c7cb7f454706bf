"""Arrays and TensorProto, as `tensorflow/core/framework/tensor.proto` defines it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.inputs.converting import converted
from distilbeam.teacher.tfserving.messages import load_messages

FLOAT, INT32, STRING, INT64, BFLOAT16 = 1, 3, 7, 9, 14
# number of the type in types.proto: NumPy type, field that holds values one by one
_TYPES = {
    1: ("<f4", "float_val"),
    2: ("<f8", "double_val"),
    3: ("<i4", "int_val"),
    4: ("u1", "int_val"),
    5: ("<i2", "int_val"),
    6: ("i1", "int_val"),
    9: ("<i8", "int64_val"),
    10: ("?", "bool_val"),
    14: ("<u2", "half_val"),
    17: ("<u2", "int_val"),
    19: ("<u2", "half_val"),
    22: ("<u4", "uint32_val"),
    23: ("<u8", "uint64_val"),
}
_HALF = 19
FILLED_BYTES = 2**20  # what the last value of a message may stand for
_MOST_DIMENSIONS = 32
_MOST_VALUES = 2**31 - 1


def type_number(dtype: np.dtype[Any]) -> int:
    """Return the number of an array's type in types.proto.

    Raises:
      ValueError: TensorFlow has no such type.
    """
    if dtype.kind in "OSU":
        return STRING
    if dtype == np.float16:
        return _HALF
    name = dtype.newbyteorder("<").str.lstrip("<|").replace("b1", "?")
    for number, (code, _) in _TYPES.items():
        if code.lstrip("<") == name and number not in (BFLOAT16, _HALF):
            return number
    raise ValueError(f"an input tensor must be numbers, text or bytes, got {dtype}")


def as_type(array: npt.NDArray[Any], number: int) -> npt.NDArray[Any]:
    """Convert numbers to the type that a signature asks for; bytes, text and unknown types stay as they are.

    Raises:
      ValueError: a number is beyond the type, where it would become infinite or another number.
    """
    if number not in _TYPES or array.dtype.kind in "OSU" or number in (BFLOAT16,):
        return array
    return converted(array, np.dtype(np.float16 if number == _HALF else _TYPES[number][0]))


def to_proto(array: npt.NDArray[Any]) -> Any:
    """Write an array as a TensorProto.

    Args:
      array: numbers, or objects that are `bytes` or `str`.

    Returns:
      The message; numbers are in `tensor_content`.
    """
    number = type_number(array.dtype)
    proto = load_messages().tensor(dtype=number)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if number == STRING:
        values = array.ravel().tolist()
        proto.string_val.extend(v.encode() if isinstance(v, str) else bytes(v) for v in values)
    else:
        proto.tensor_content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return proto


def to_array(proto: Any) -> npt.NDArray[Any]:
    """Read a TensorProto that somebody else wrote.

    Nothing is made before the shape and the values that came agree, so that a short message cannot ask for a large array;
    where the last value stands for those that follow, it may do so for `FILLED_BYTES`.

    Args:
      proto: the message.

    Returns:
      The array, read-only where it views the message; bfloat16 becomes float32, text stays `bytes` objects.

    Raises:
      ValueError: a type that is not read, a shape that is none, or another number of values than the shape says.
    """
    shape = declared_shape(proto)
    if proto.dtype == STRING:
        _require_count(len(proto.string_val), shape)
        strings = np.empty(len(proto.string_val), object)
        strings[:] = list(proto.string_val)
        return strings.reshape(shape)
    if proto.dtype not in _TYPES:
        raise ValueError(f"tensors of type number {proto.dtype} (types.proto) cannot be read")
    code, field = _TYPES[proto.dtype]
    if proto.tensor_content:
        values = _from_content(proto.tensor_content, np.dtype(code), shape)
    else:
        values = _one_by_one(getattr(proto, field), np.dtype(code), shape)
    if proto.dtype == _HALF:
        values = values.view(np.float16)
    elif proto.dtype == BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def declared_shape(proto: Any) -> tuple[int, ...]:
    """Read the shape that a TensorProto says it has.

    Raises:
      ValueError: it says none, a negative size, too many dimensions, or more values than an array can have.
    """
    if proto.tensor_shape.unknown_rank:
        raise ValueError("a tensor must say its shape, got one of unknown rank")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim[: _MOST_DIMENSIONS + 1])
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor must have at most {_MOST_DIMENSIONS} dimensions, got more")
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > _MOST_VALUES:
        raise ValueError(
            f"a tensor of shape {list(shape)} cannot be read: sizes must be from 0 to {_MOST_VALUES:,} together"
        )
    return shape


def _from_content(content: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if len(content) % dtype.itemsize:
        raise ValueError(
            f"a tensor of {dtype.name} must have whole numbers of {dtype.itemsize} bytes, got {len(content):,}"
        )
    _require_count(len(content) // dtype.itemsize, shape)
    return np.frombuffer(content, dtype)


def _one_by_one(stored: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    count, wanted = len(stored), math.prod(shape)
    filled = wanted - count if count else 0
    if not 0 <= filled <= FILLED_BYTES // dtype.itemsize:
        _require_count(count, shape)
    _require_count(count + filled, shape)
    wide = np.int64 if dtype.kind in "iu" and dtype.itemsize < 8 else dtype  # stored as wider numbers than the type's
    values = np.fromiter(stored, wide, count).astype(dtype)
    return np.concatenate([values, np.repeat(values[-1:], filled)]) if filled else values


def _require_count(count: int, shape: tuple[int, ...]) -> None:
    if count != math.prod(shape):
        raise ValueError(f"a tensor of shape {list(shape)} must have {math.prod(shape):,} values, got {count:,}")
