"""Beam's own options, checked: they follow `--` on the command line, and one that Beam does not know is an error.

Beam itself only logs a warning for a flag it does not know and runs the job without it, so a misspelt `--max_num_worker`
costs a night. Here every flag is compared with those of every `PipelineOptions` subclass.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    PortableOptions,
    PrismRunnerOptions,
    _BeamArgumentParser,
)

from distilbeam.pipelines.engine.forkserver import LOCAL_RUNNER
from distilbeam.pipelines.engine.prism import prism_of, workers_of

_TASKS_PER_THREAD = 8
_ON_THIS_MACHINE = (None, "LOOPBACK", "EXTERNAL")  # of Prism's environments; a pool of workers is where Prism is
DEFAULT_RUNNER = "DISTILBEAM_RUNNER"
DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"


class _StrictParser(_BeamArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"Beam refuses the options after '--': {message}")


def pipeline_options(flags: Sequence[str] = ()) -> PipelineOptions:
    """Turn the flags that follow `--` into pipeline options.

    Where no runner is named it is the one of the environment variable `DISTILBEAM_RUNNER`, else `FnApiRunner`: Beam's default
    first tries to download another engine. `DaskRunner` is accepted as a short name.

    Args:
      flags: words such as `--runner=DataflowRunner`.

    Returns:
      The options.

    Raises:
      ValueError: a flag that Beam does not know, a value it does not accept, or Prism is named where there is none.
    """
    flags = list(flags)
    if not any(flag == "--runner" or flag.startswith("--runner=") for flag in flags):
        flags.append(f"--runner={os.environ.get(DEFAULT_RUNNER) or LOCAL_RUNNER}")
    flags = [
        flag.replace("DaskRunner", DASK_RUNNER) if flag in ("DaskRunner", "--runner=DaskRunner") else flag
        for flag in flags
    ]
    if any(DASK_RUNNER in flag for flag in flags):
        _register_dask_options()
    parser = _StrictParser(allow_abbrev=False, add_help=False)
    for subclass in _option_classes(PipelineOptions):
        if "_add_argparse_args" in vars(subclass):
            subclass._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(flags)
    if unknown:
        raise ValueError(_unknown_flag_sentence(unknown[0], parser))
    options = PipelineOptions(flags)
    prism = prism_of(options)
    if prism is not None:  # what is wrong with PRISM or a number is said here, not when the first phase begins
        workers_of(options)
        _name_prism(options, prism)
    return options


def _name_prism(options: PipelineOptions, prism: Path) -> None:
    """Say in the options what is meant, for a pipeline of one's own: Beam would fetch a Prism, and want containers."""
    options.view_as(PrismRunnerOptions).prism_location = str(prism)
    portable = options.view_as(PortableOptions)
    portable.environment_type = portable.environment_type or "LOOPBACK"


@contextmanager
def spread_over_tasks(options: PipelineOptions, items: int) -> Iterator[None]:
    """Cut a pipeline's items into equal tasks on Dask, about eight for each thread of the cluster; elsewhere do nothing.

    Dask itself would put 128 items into one task; one item in each would make thousands of tasks in its graph, and no item
    could be flushed to the disk while the next one is worked on.
    """
    if options.get_all_options().get("runner") != DASK_RUNNER:
        yield
        return
    from apache_beam.runners.dask.dask_runner import DaskOptions

    dask = options.view_as(DaskOptions)
    if dask.npartitions is not None or dask.partition_size is not None:
        yield
        return
    dask.partition_size = math.ceil(items / (_TASKS_PER_THREAD * _dask_threads(dask.address)))
    try:
        yield
    finally:
        dask.partition_size = None


def spares_processor(options: PipelineOptions) -> bool:
    """Tell whether a pipeline's workers leave a processor of this machine idle; of other machines nothing is known."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if prism_of(options) is not None and options.view_as(PortableOptions).environment_type in _ON_THIS_MACHINE:
        return workers_of(options) < processors
    if options.get_all_options().get("runner") != LOCAL_RUNNER:
        return False
    direct = options.view_as(DirectOptions)
    several = direct.direct_running_mode != "in_memory"
    workers = (direct.direct_num_workers or processors) if several else 1  # 0 is as many as there are processors
    return bool(workers < processors)


def _dask_threads(address: str | None) -> int:
    if address is None:  # the runner starts a cluster of this machine's processors
        return os.cpu_count() or 1
    from dask.distributed import Client

    with Client(address, set_as_default=False) as client:
        threads: dict[str, int] = client.nthreads()
        return sum(threads.values()) or 1


def _register_dask_options() -> None:
    try:
        import apache_beam.runners.dask.dask_runner  # noqa: F401  # registers its PipelineOptions subclass
    except ImportError as e:
        raise ValueError("the Dask runner needs its packages: pip install 'distilbeam[dask]'") from e


def _option_classes(cls: Any) -> Iterator[Any]:
    seen: set[str] = set()
    for subclass in cls.__subclasses__():
        if str(subclass) not in seen:
            seen.add(str(subclass))
            yield subclass
            yield from _option_classes(subclass)


def _unknown_flag_sentence(flag: str, parser: argparse.ArgumentParser) -> str:
    name = flag.split("=", 1)[0]
    if not name.startswith("-"):
        return f"'{flag}' is not a Beam option: what follows '--' must be flags such as --runner=DataflowRunner"
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name} is not a Beam option" + (
        f"; did you mean {near[0]}?" if near else "; see Beam's documentation of its runners"
    )
