"""A run in a process of its own, killed with SIGKILL when it has committed what is named, and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class StartedRun:
    """A run that can be started again and again.

    Attributes:
      place: the folder that it is started in; its directory is `run` there.
      words: what comes behind `python`.
    """

    place: Path
    words: tuple[str, ...] = ("-m", "distilbeam", "run", "run.toml")

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, as the leader of a group of processes."""
        environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=self.place,
            start_new_session=True,
        )

    def kill_when(self, moment: str, more: int = 1) -> bool:
        """Start it, and kill it and its workers when so many more files match; return False if it ended before.

        Args:
          moment: pattern of files, relative to the run directory.
          more: how many more than there are now.
        """
        wanted = len(list((self.place / "run").glob(moment))) + more
        process = self.start()
        while process.poll() is None:
            if len(list((self.place / "run").glob(moment))) >= wanted:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return True
            time.sleep(0.002)
        process.communicate()
        return False

    def finish(self) -> str:
        """Start it and wait for its end; return what it printed."""
        process = self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output.decode()
        return output.decode()
