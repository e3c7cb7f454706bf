"""Where kernels are launched: on the device of their tensors, whichever is the current one."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the GPU of a tensor the current one, as Triton expects; nothing for other devices."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
