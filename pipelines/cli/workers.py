"""The command for workers beside a runner: `workers`."""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

import typer

from distilbeam.pipelines.cli.options import DebugOption, LogOption, console
from distilbeam.pipelines.engine.display import Display, configure_logs


def workers(
    count: Annotated[
        int | None, typer.Option(min=1, help="Most worker processes at a time; by default, one for each processor.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen at; whoever reaches it can run code here, there is no password."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 50000,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Offer worker processes to Prism, Flink or Spark, until Ctrl-C or SIGTERM: what a runner's EXTERNAL environment asks for."""
    configure_logs(log_level, console)
    count = count or len(os.sched_getaffinity(0))
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.engine.worker_pool import WorkerPool

        pool = WorkerPool(count)
        address = pool.start(host, port)
    say = Display(console).say
    say(
        f"{count} worker(s) at {address}. For example: distilbeam label CONFIG -- --runner=PrismRunner "
        f"--environment_type=EXTERNAL --environment_config={address} --sdk_worker_parallelism={count}"
    )
    ended.wait()
    say("Ending: workers keep what they were answered.")
    pool.stop()
