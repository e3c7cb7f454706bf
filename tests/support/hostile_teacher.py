"""A teacher whose behaviour a file says, so that it can be mended without becoming another teacher."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch

from distilbeam.teacher.protocol import TeacherUnavailable

CLASSES = 3


class HostileTeacher(torch.nn.Module):
    """Answers linearly in the first features, and logs the rows it was asked about before it does anything.

    Args:
      log: file that gets a line per row: the row's bytes in hexadecimal.
      behaviour: JSON file, missing for a good teacher. Rows whose first feature is below `fail_below` make the call raise
        `message`, below `kill_below` they kill the process, below `away_below` the server is unavailable, below
        `nan_below` the answer is NaN; `delay_s` is what a call takes.
    """

    def __init__(self, log: str = "asked.log", behaviour: str = "behaviour.json") -> None:
        super().__init__()
        self.log, self.behaviour = log, Path(behaviour)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said = json.loads(self.behaviour.read_text()) if self.behaviour.exists() else {}
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"".join(row.numpy().tobytes().hex().encode() + b"\n" for row in x))
        os.close(descriptor)
        lowest = float(x[:, 0].min())
        if lowest < said.get("kill_below", -1e9):
            os.kill(os.getpid(), signal.SIGSEGV)
        if lowest < said.get("away_below", -1e9):
            raise TeacherUnavailable("the server went away")
        if lowest < said.get("fail_below", -1e9):
            raise RuntimeError(said.get("message", "this row makes the teacher raise"))
        time.sleep(said.get("delay_s", 0.0))
        answer = 2.5 * x[:, :CLASSES]
        answer[x[:, 0] < said.get("nan_below", -1e9)] = float("nan")
        return answer
