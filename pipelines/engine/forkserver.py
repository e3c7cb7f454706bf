"""Worker processes that start at once, for Beam's local runner with `--direct_running_mode=multi_processing`.

`begin` starts the process that workers are forked from (`forkserver_process`), early, so that it imports while the driver does;
`local_runner` gives the runner that takes its workers from there. One such process serves all phases of this one.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbeam.pipelines.engine import forkserver_client
from distilbeam.pipelines.engine.worker_ports import bind_to_loopback
from distilbeam.storage.private_folders import PREFIX, claim

if TYPE_CHECKING:  # Beam takes seconds to import, which `begin` shall not wait for
    from apache_beam.options.pipeline_options import PipelineOptions

LOCAL_RUNNER = "FnApiRunner"
DEATH = "death-"  # a file of the server for each worker that did not end well, with its status
CLIENT = "forkserver_client.py"  # in the command line of every process that stands for a worker
_MODULES = (
    "apache_beam.runners.worker.sdk_worker_main",
    "apache_beam.runners.worker.sdk_worker",
    "distilbeam.pipelines.engine.phase",
    "distilbeam.pipelines.labelling.phase",
    "distilbeam.pipelines.acquisition.score",
)
_lock = threading.Lock()
_servers: dict[int, _Server] = {}  # by process, because a fork of this one must not use its parent's


class _Server:
    """The server's process, which removes the folder of its socket when it ends."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix=f"{PREFIX}workers-")
        claim(Path(self.folder))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distilbeam.pipelines.engine.forkserver_process", self.folder, *_MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # threads do not survive a fork
        )
        atexit.register(self.end)

    def wait(self) -> None:
        """Wait until it has imported everything.

        Raises:
          RuntimeError: it ended.
        """
        assert self.process.stdout is not None
        if not self.process.stdout.closed:
            ready = self.process.stdout.readline()
            self.process.stdout.close()
            if not ready:
                raise RuntimeError("the process that starts workers ended; what it printed is above")

    def end(self) -> None:
        """End it and its workers."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def deaths() -> dict[int, str]:
    """Return the workers that did not end well, by process id, with how: those of this process's server."""
    server = _servers.get(os.getpid())
    if server is None:
        return {}
    files = Path(server.folder).glob(f"{DEATH}*")
    return {int(file.name.removeprefix(DEATH)): how_it_ended(int(file.read_text() or 0)) for file in files}


def how_it_ended(status: int) -> str:
    """Say how a process ended, from what `os.waitpid` tells."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)}"


def in_processes(options: PipelineOptions) -> bool:
    """Tell whether the options ask for worker processes on this machine."""
    from apache_beam.options.pipeline_options import DirectOptions

    several = options.view_as(DirectOptions).direct_running_mode == "multi_processing"
    return bool(several and options.get_all_options().get("runner") == LOCAL_RUNNER)


def sheltered(options: PipelineOptions) -> PipelineOptions:
    """Return options with which work in this process is done in worker processes, of which this one can survive the death."""
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions

    if options.get_all_options().get("runner") != LOCAL_RUNNER or in_processes(options):
        return options
    direct = options.view_as(DirectOptions)
    workers = direct.direct_num_workers if direct.direct_running_mode == "multi_threading" else 1
    given = {name: value for name, value in options.get_all_options(drop_default=True).items() if value is not None}
    copy = PipelineOptions.from_dictionary({**given, "direct_num_workers": workers})
    copy.view_as(DirectOptions).direct_running_mode = "multi_processing"
    return copy


def begin(flags: Sequence[str]) -> None:
    """Start the process that workers are forked from, if Beam's flags ask for worker processes and there is none yet.

    Args:
      flags: Beam's options as words; nothing is said of wrong ones.
    """
    words = [word for flag in flags for word in flag.split("=", 1)]
    elsewhere = any(word == "--runner" and value != LOCAL_RUNNER for word, value in pairwise(words))
    if ("--direct_running_mode", "multi_processing") in pairwise(words) and not elsewhere:
        _server()


def server_folder() -> Path:
    """Return the folder of the socket of the process that workers are forked from, once it has imported everything.

    Raises:
      RuntimeError: it does not start.
    """
    server = _server()
    server.wait()
    return Path(server.folder)


def local_runner(options: PipelineOptions) -> tuple[Any, PipelineOptions]:
    """Return Beam's local runner with workers from the warm process, and the options to run it with.

    Workers log from warnings on, unless the options say otherwise.

    Raises:
      RuntimeError: the process that workers are forked from does not start.
    """
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, WorkerOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    bind_to_loopback()
    folder = server_folder()
    level = options.view_as(WorkerOptions).default_sdk_harness_log_level or "WARNING"
    command = "exec " + shlex.join(
        [sys.executable, "-I", "-S", str(Path(forkserver_client.__file__)), str(folder), level]
    )
    given = {name: value for name, value in options.get_all_options(drop_default=True).items() if value is not None}
    copy = PipelineOptions.from_dictionary(given)
    # No mode at all: Beam then takes the environment of its runner, and says nothing about the number of workers.
    copy.view_as(DirectOptions).direct_running_mode = None
    return FnApiRunner(SubprocessSDKEnvironment.from_command_string(command)), copy


def _server() -> _Server:
    with _lock:
        server = _servers.get(os.getpid())
        if server is None or server.process.poll() is not None:
            server = _servers[os.getpid()] = _Server()
        return server
