"""A weight quantised once per step, however often the layer runs in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from distilbeam.kernels.quantize.formats import QuantizedRows

_steps = 0


class WeightCache:
    """Keeps a weight's rows in 8 bits until the weight changes.

    A change is a write that autograd counts (`copy_`, `load_state_dict`, most optimisers), a step of any torch optimiser
    (fused ones write without being counted), or other memory: another storage, whether or not it lies where a former one
    lay. Who writes to `weight.data` by hand calls `clear()`.
    """

    def __init__(self) -> None:
        _count_steps()
        self.clear()

    def clear(self) -> None:
        """Forget the rows."""
        self._key: tuple[Any, ...] | None = None
        self._rows: QuantizedRows | None = None

    def rows_of(self, weight: Tensor, quantize: Callable[[Tensor], QuantizedRows]) -> QuantizedRows:
        """Give the weight's rows in 8 bits.

        Args:
          weight: floating [N, K].
          quantize: does the work; called only when the weight may have changed.

        Returns:
          The rows, which nobody may write to.
        """
        if weight.is_inference():  # nobody counts the writes to it
            return quantize(weight.detach())
        # a weak reference keeps the storage's identity from being given away, not its memory; one to the tensor itself
        # would forbid torch.utils.swap_tensors
        storage = StorageWeakRef(weight.untyped_storage())
        place = weight.storage_offset(), weight.shape, weight.stride()
        key = (storage, place, weight._version, weight.dtype, weight.device, _steps)
        if self._rows is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # kept beyond an inference, for a backward pass as well
                self._key, self._rows = key, quantize(weight.detach())
        return self._rows

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()  # a copy of the layer has a weight of its own


@functools.cache
def _count_steps() -> None:
    def after_step(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(after_step)
