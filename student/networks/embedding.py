"""Embeddings: what a student's last linear layer sees of its input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def seen_by_head(module: nn.Module, num_classes: int) -> Iterator[list[Tensor]]:
    """Collect what a network's head sees while it answers in this thread.

    Args:
      module: the network; its head is its last linear layer with as many outputs as there are classes.
      num_classes: number of classes.

    Yields:
      A list that gets a float32 tensor [rows, d] on the CPU with each forward pass.

    Raises:
      ValueError: the network has no such layer.
    """
    heads = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == num_classes]
    if not heads:
        raise ValueError(
            f"a student must end in a torch.nn.Linear of {num_classes:,} outputs to have embeddings, {type(module).__name__} "
            "has none; choose another selection.method"
        )
    seen: list[Tensor] = []
    thread = threading.get_ident()  # others may use the same network

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            seen.append(arguments[0].detach().float().cpu().flatten(1))

    hook = heads[-1].register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()
