"""Prism, Beam's portable runner for one machine: found, started for a job, and gone with it.

It is started here and not by Beam, so that it dies with this process however that ends, on a port of its own, out of reach of
Ctrl-C, and writes its lines into a file of the job. That is quicker, too: Beam looks for it every tenth of a second, and runs
pip before each pipeline.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distilbeam.pipelines.engine.worker_ports import bind_to_loopback

if TYPE_CHECKING:  # Beam takes seconds to import
    from apache_beam.options.pipeline_options import PipelineOptions

PRISM_RUNNER = "PrismRunner"
_START_S = 30.0
_LOOK_S = 0.005  # it listens after 20 ms
_DIE_WITH_PARENT = (  # 1 is PR_SET_PDEATHSIG
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
_NO_FREEZE = "disable_logging_submission_environment"  # Beam would run pip for seconds at every start
BATCH_ONLY = ("FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner")


@dataclass(frozen=True)
class Runner:
    """Which runner does a job.

    Attributes:
      flags: Beam's options.
      prism: the program, where this process is to start one.
    """

    flags: tuple[str, ...]
    prism: Path | None = None

    @property
    def reads_pubsub(self) -> bool:
        """Whether the runner has a reader of Pub/Sub of its own, as Dataflow alone has."""
        return (_value(self.flags, "--runner") or "").rsplit(".", 1)[-1] == "DataflowRunner"


class PrismNotStartedError(RuntimeError):
    """Prism ended at once, or does not listen.

    Args:
      status: how it ended, as `Popen.poll` says it.
      log: file of its lines.
    """

    def __init__(self, status: int | None, log: Path) -> None:
        super().__init__(f"Prism did not start; its lines are in {log}")
        self.how = "it does not listen" if status is None else f"it ended with status {status}"


def find_prism() -> Path | None:
    """Return the program that `PRISM` names, or the one on the PATH; None where there is none.

    Raises:
      ValueError: `PRISM` names something that cannot be run.
    """
    named = os.environ.get("PRISM")
    found = shutil.which(named or "prism")
    if named and found is None:
        raise ValueError(f"the environment variable PRISM must name a program, got '{named}'")
    return None if found is None else Path(found)


def choose_runner(flags: Sequence[str], *, unbounded: bool) -> Runner:
    """Choose the runner: the one that the flags name, else Prism where it is found, else the local one for what has an end.

    Args:
      flags: Beam's options.
      unbounded: whether the source has no end.

    Raises:
      ValueError: the named runner cannot do what has no end, or there is none that can.
    """
    named = _value(flags, "--runner")
    location = _value(flags, "--prism_location")
    name = "" if named is None else named.rsplit(".", 1)[-1]
    if name in ("", PRISM_RUNNER):
        prism = find_prism() if location is None else _program(location)
        if prism is not None:
            rest = _without(flags, ("--runner", "--prism_location"))
            return Runner((*rest, "--runner=PortableRunner", f"--experiments={_NO_FREEZE}", *_loopback(rest)), prism)
        if name == PRISM_RUNNER or not unbounded:
            return Runner(tuple(flags))  # Beam fetches its own, or the local runner does it
    elif not (unbounded and name in BATCH_ONLY):
        return Runner(tuple(flags))
    who = f"{name} writes nothing" if name else "the runner of this machine, FnApiRunner, writes nothing"
    raise ValueError(
        f"{who} before its source has ended, and messages have no end: name Prism with the environment variable PRISM or put "
        "it on the PATH as prism (https://github.com/apache/beam/releases has it for every version), or name a cluster with "
        "-- --runner=FlinkRunner or --runner=DataflowRunner; --until=latest labels what a Kafka topic has now and ends"
    )


def prism_of(options: PipelineOptions) -> Path | None:
    """Return the program where options ask for Prism and this process is to start it.

    None for every other runner, for a Prism that runs elsewhere (`--job_endpoint`), and where no program is found, so that
    Beam fetches its own.

    Raises:
      ValueError: `PRISM` names something that cannot be run.
    """
    from apache_beam.options.pipeline_options import PortableOptions, PrismRunnerOptions

    if options.get_all_options().get("runner") != PRISM_RUNNER or options.view_as(PortableOptions).job_endpoint:
        return None
    location = options.view_as(PrismRunnerOptions).prism_location
    return find_prism() if location is None else _program(location)


def workers_of(options: PipelineOptions) -> int:
    """Return how many workers options ask for on Prism, 0 for one for each processor; Beam keeps the number as text.

    Raises:
      ValueError: that is no number.
    """
    from apache_beam.options.pipeline_options import PortableOptions

    given = str(options.view_as(PortableOptions).sdk_worker_parallelism)
    if not given.isdecimal():
        raise ValueError(f"--sdk_worker_parallelism must be a number, got '{given}'")
    return int(given) or os.cpu_count() or 1


def on_prism(options: PipelineOptions, address: str) -> PipelineOptions:
    """Return the options with which a pipeline is submitted to the Prism at an address.

    Its workers are threads of this process where the options name no others.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

    bind_to_loopback()
    given = {name: value for name, value in options.get_all_options(drop_default=True).items() if value is not None}
    given.pop("prism_location", None)
    environment = given.get("environment_type", "LOOPBACK")
    experiments = [*given.pop("experiments", []), _NO_FREEZE]
    changed = {
        "runner": "PortableRunner",
        "job_endpoint": address,
        "environment_type": environment,
        "experiments": experiments,
        "sdk_worker_parallelism": 1,  # of each job; see `submission`
    }
    return PipelineOptions.from_dictionary({**given, **changed})


@contextmanager
def running(program: Path, log: Path) -> Iterator[str]:
    """Run Prism until the block ends.

    Args:
      program: the program.
      log: file that its lines are added to.

    Yields:
      The address of its job service.

    Raises:
      PrismNotStartedError: it does not start.
    """
    port = _free_port()
    command = [str(program), f"-job_port={port}", "-serve_http=false", "-log_level=warn", "-log_kind=text"]
    command = _dying_with_us(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as lines:
        process = subprocess.Popen(  # a session of its own: Ctrl-C is for the job, which ends it
            command,
            stdout=lines,
            stderr=lines,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _await(process, port, log)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(_LOOK_S)
        else:
            return
    raise PrismNotStartedError(process.poll(), log)


def _dying_with_us(command: list[str]) -> list[str]:
    """Have the system end a program with this process, where it can: a killed job leaves nothing running.

    A program does that before it becomes this one. Code of ours between fork and exec (`preexec_fn`) would run beside gRPC's
    threads, of which the fork has the locks and not the threads: now and then the child dies there.
    """
    if not sys.platform.startswith("linux"):
        return command
    setpriv = shutil.which("setpriv")
    if setpriv is not None and Path(setpriv).resolve().name != "busybox":  # whose setpriv cannot
        return [setpriv, "--pdeathsig", "KILL", "--", *command]
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, *command]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(location: str) -> Path | None:
    path = Path(location)
    return path if path.is_file() and os.access(path, os.X_OK) else None  # an address or an archive is for Beam


def _loopback(flags: Sequence[str]) -> list[str]:
    return [] if _value(flags, "--environment_type") else ["--environment_type=LOOPBACK"]


def _value(flags: Sequence[str], name: str) -> str | None:
    for flag, following in zip(flags, (*flags[1:], ""), strict=False):
        if flag == name:
            return following
        if flag.startswith(f"{name}="):
            return flag.partition("=")[2]
    return None


def _without(flags: Sequence[str], names: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for flag in flags:
        if skip:
            skip = False
            continue
        skip = flag in names
        if not skip and flag.partition("=")[0] not in names:
            kept.append(flag)
    return kept
