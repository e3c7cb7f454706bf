"""Arrays and TensorProto, as `tensorflow/core/framework/tensor.proto` defines it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.teacher.tfserving.messages import load_messages

FLOAT, STRING, INT32, BFLOAT16 = 1, 7, 3, 14
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
    """Convert numbers to the type that a signature asks for; bytes, text and unknown types stay as they are."""
    if number not in _TYPES or array.dtype.kind in "OSU" or number in (BFLOAT16,):
        return array
    return array.astype(np.float16 if number == _HALF else _TYPES[number][0], copy=False)


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
    """Read a TensorProto.

    Args:
      proto: the message.

    Returns:
      The array, read-only where it views the message; bfloat16 becomes float32, text stays `bytes` objects.

    Raises:
      ValueError: a type that is not read, or another number of values than the shape says.
    """
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.dtype == STRING:
        strings = np.empty(len(proto.string_val), object)
        strings[:] = list(proto.string_val)
        return _shaped(strings, shape)
    if proto.dtype not in _TYPES:
        raise ValueError(f"tensors of type number {proto.dtype} (types.proto) cannot be read")
    code, field = _TYPES[proto.dtype]
    if proto.tensor_content:
        values = np.frombuffer(proto.tensor_content, code)
    else:
        values = np.array(getattr(proto, field), np.int64 if field in ("int_val", "half_val") else None).astype(code)
        if math.prod(shape) > 0 < len(values) < math.prod(shape):  # the last value stands for all that follow
            values = np.concatenate([values, np.repeat(values[-1:], math.prod(shape) - len(values))])
    if proto.dtype == _HALF:
        values = values.view(np.float16)
    elif proto.dtype == BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return _shaped(values, shape)


def _shaped(values: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if values.size != math.prod(shape):
        raise ValueError(f"a tensor of shape {list(shape)} must have {math.prod(shape):,} values, got {values.size:,}")
    return values.reshape(shape)
