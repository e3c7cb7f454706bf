"""A teacher that keeps a log of what it was asked, so that tests can count; loaded by its module name, in any process."""

from __future__ import annotations

import os
import time

import torch

CLASSES = 3


class LoggingTeacher(torch.nn.Module):
    """Answers linearly in the first features.

    Args:
      log: file that gets a line per row: the row's bytes in hexadecimal.
      fail_below: rows whose first feature is below it make the whole call raise.
      delay_s: seconds that a call takes.
    """

    def __init__(self, log: str, fail_below: float | None = None, delay_s: float = 0.0) -> None:
        super().__init__()
        self.log, self.fail_below, self.delay_s = log, fail_below, delay_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail_below is not None and (x[:, 0] < self.fail_below).any():
            raise RuntimeError("this row makes the teacher raise")
        time.sleep(self.delay_s)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"".join(row.numpy().tobytes().hex().encode() + b"\n" for row in x))
        os.close(descriptor)
        return 2.5 * x[:, :CLASSES]
