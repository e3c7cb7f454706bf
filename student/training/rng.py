"""The random numbers of a training: generators of its own, whose state can be kept and put back.

Dropout and the initial weights draw from torch's global generators; networks of one's own may draw from NumPy's. A
training seeds them, and gives them back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

NUMPY_KEY, NUMPY_REST = "numpy.key", "numpy.rest"


@contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators and NumPy's global one, and put them back when the block ends.

    Args:
      seed: a generator begins with it, whichever it is.
      device: whose generator is seeded beside the CPU's.
    """
    before = np.random.get_state()  # noqa: NPY002 - what networks of one's own may draw from
    has_own = device.type not in ("cpu", "xla")
    with torch.random.fork_rng([device] if has_own else [], device_type=device.type if has_own else "cuda"):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


def generator_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the generators as tensors."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    rest = [numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]]
    state = {
        "cpu": torch.get_rng_state(),
        NUMPY_KEY: torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        NUMPY_REST: torch.tensor(rest, dtype=torch.float64),
    }
    if device.type not in ("cpu", "xla"):
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_generator_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators where `generator_state` found them."""
    torch.set_rng_state(state["cpu"])
    position, has_gauss, gauss = state[NUMPY_REST].tolist()
    key = state[NUMPY_KEY].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(position), int(has_gauss), gauss))  # noqa: NPY002
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
