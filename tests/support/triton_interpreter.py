"""Make Triton's interpreter convert numbers as a GPU does.

As shipped (3.6 and 3.7) it cuts the mantissa off where a GPU rounds to nearest even, loses carries on the way to 8 bits,
and multiplies bfloat16 matrices as the integers that hold their bits. Conversions between floating types are handed to
torch here, which rounds as the GPU does; matrices of types that NumPy lacks are widened before they are multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
HELD_AS = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16), 4: (np.uint32, torch.uint32)}
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # conversions to 8 bits saturate


def converted(data: np.ndarray, source: Any, target: Any) -> np.ndarray:
    """Convert raw interpreter data between floating types, rounding to nearest even."""
    held, view = HELD_AS[source.itemsize]
    bits = np.ascontiguousarray(data).view(held).reshape(-1).copy()
    values = torch.from_numpy(bits).view(view).view(TORCH[source]).float()
    if target in LARGEST:
        values = values.clamp(-LARGEST[target], LARGEST[target])
    held, view = HELD_AS[target.itemsize]
    return values.to(TORCH[target]).view(view).numpy().view(held).reshape(data.shape)


def correct() -> None:
    """Replace the interpreter's conversions and products."""
    convert, cast = interpreter._convert_float, interpreter.InterpreterBuilder.cast_impl

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source.scalar in TORCH and target.scalar in TORCH:
            return converted(data, source.scalar, target.scalar)
        return convert(data, source, target, rounding)

    def cast_impl(self: Any, handle: Any, target: Any) -> Any:
        source = handle.dtype.scalar
        if source in TORCH and target.scalar in TORCH:
            data = converted(handle.data, source, target.scalar).view(interpreter._get_np_dtype(target))
            return interpreter.TensorHandle(data, target.scalar)
        return cast(self, handle, target)

    def create_dot(_self: Any, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
        product = np.matmul(_wide(a), _wide(b), dtype=accumulator.data.dtype)
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpreterBuilder.create_dot = create_dot


def _wide(handle: Any) -> np.ndarray:
    source = handle.dtype.scalar
    narrow = source in (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    return converted(handle.data, source, tl.float32).view(np.float32) if narrow else handle.data
