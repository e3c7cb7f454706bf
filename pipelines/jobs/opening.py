"""Opening a run directory: one process holds it, and it belongs to the configuration that its labels were made by.

A run directory belongs to what its labels mean: the data, the teacher, the form of the labels and how they are chosen. More
rounds go on in it; students of other settings learn from its labels in a directory beside its own (`variants.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig, differing_keys
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.pool.object_store import is_hidden
from distilbeam.pipelines.pool.pool_files import root_of
from distilbeam.storage.files import sweep
from distilbeam.storage.lease import FOLDER as LEASE
from distilbeam.storage.paths import is_remote, read_texts, to_path
from distilbeam.storage.private_folders import remove_left
from distilbeam.storage.stores import store_of
from distilbeam.student.training.config import FREE
from distilbeam.teacher.softlabels.placing import commit_all_left

AnyConfig = RunConfig | TokenRunConfig | LabelConfig
# where the data are; what they are is frozen by their digests, which are compared where a place is another one
DATA = ("pool", "labelled", "validation")
# settings of [teacher] that say how it is reached and how fast it is asked; what it is has a fingerprint
OPERATION = (
    *("address", "addresses", "batch_rows", "batch_bytes", "parallel", "timeout_s", "attempts", "first_wait_s"),
    *("longest_wait_s", "max_message_bytes", "tls", "ca_file", "cert_file", "key_file", "server_name", "headers"),
    *("threads", "providers", "device", "batch_tokens"),
)
# settings that change no label of a run, nor which are bought: those of the students, and of how and how long work is done
_FREE_SECTIONS = ("student", "training", "prices", "tune", "pareto", "watch")
_FREE = (
    ("run", "directory"),
    ("run", "rounds"),
    ("run", "accept_weak_teacher"),
    ("run", "compare_plain"),
    ("selection", "compare_uniform"),
    ("labels", "pooled"),
    ("data", "check_classes"),
    *(("data", name) for name in DATA),
    *(("teacher", name) for name in OPERATION),
)
# how a step of a language model is shared out, and what is seen of it, beside what is free for every training
_FREE_OF_TOKENS = (*FREE, "accumulate", "shard", "checkpointing", "device")
_ENGINE = ("unit_rows", "shard_rows")  # what the names of units and shards depend on


@contextmanager
def opened_run(config: AnyConfig) -> Iterator[RunDirectory]:
    """Create or reopen the run directory of a configuration and hold it until the block ends.

    Args:
      config: the configuration, with absolute paths.

    Yields:
      The run directory.

    Raises:
      ValueError: the directory cannot be written, is held by another process, or belongs to another configuration.
    """
    root = to_path(config.run.directory).resolve()
    _check_apart(config)
    if is_remote(root) and not isinstance(config, LabelConfig):
        raise ValueError(
            f"run.directory must be on a file system, a run trains students there; got {root}. Labelling jobs (without "
            "[selection], [student] and [training]) can be in an object store"
        )
    with store_of(root).hold(root, "run.directory", "--set run.directory=..."):
        directory = _checked(RunDirectory(root), config)
        if not directory.moved:  # else when the data were found to be the same
            directory.record(config)
        store_of(root).finish_move(root)
        if not is_remote(root):  # uploads leave nothing under a temporary name
            from distilbeam.student.training.checkpoints import remove_finished  # takes torch's seconds to import

            remove_left()
            sweep(root)
            commit_all_left(root)
            remove_finished(root)
        try:
            yield directory
        except ValueError:
            directory.forget_unstarted()
            raise


def check_former(config: AnyConfig) -> None:
    """Say at once, without holding or making anything, that a run directory belongs to another configuration.

    Of an object store nothing is asked yet.

    Raises:
      ValueError: it does.
    """
    directory = RunDirectory(to_path(config.run.directory))
    if not store_of(directory.root).by_request and directory.config.exists():
        _checked(directory, config)


def planned_run(config: AnyConfig) -> RunDirectory:
    """Give the directory that a configuration would work in, without holding or making anything; see `opened_run`."""
    directory = RunDirectory(to_path(config.run.directory).resolve())
    if not isinstance(config, LabelConfig) and directory.config.exists():
        return _checked(directory, config)
    return directory


def require_apart(directory: Path, source: Path, setting: str) -> None:
    """Check that a run directory and a folder, or pattern, of files to be labelled do not hold each other.

    What the run writes would be read as rows to be labelled otherwise.

    Args:
      directory: the run directory.
      source: where the files are.
      setting: what named them, for errors.

    Raises:
      ValueError: one is in the other.
    """
    directory, source = directory.resolve(), _searched(source)
    outer, inner = (source, directory) if directory.is_relative_to(source) else (directory, source)
    if not inner.is_relative_to(outer) or (inner != outer and outer == source and is_hidden(_below(inner, outer))):
        return
    names = ("run.directory", setting) if inner == directory else (setting, "run.directory")
    raise ValueError(
        f"{names[0]} ({inner}) must not be inside {names[1]} ({outer}): labels would be read as rows to be labelled; choose "
        "another run.directory"
    )


def _searched(source: Path) -> Path:
    """Return the folder of which all files are read; a pattern without `**` reads none of a folder below."""
    if is_remote(source):
        return source
    return root_of(source) if source.is_dir() or "**" in source.parts else source.resolve()


def _below(inner: Path, outer: Path) -> str:
    return inner.relative_to(outer).as_posix()


def _check_apart(config: AnyConfig) -> None:
    root, pool = to_path(config.run.directory), to_path(config.data.pool)
    if store_of(root) is store_of(pool):
        require_apart(root, pool, "data.pool")


def _checked(directory: RunDirectory, config: AnyConfig) -> RunDirectory:
    """Check that a directory is new or belongs to a configuration, and find the place of its students."""
    if not directory.config.exists():
        strangers = [
            p.name for p in directory.root.iterdir() if p.name not in (".lock", LEASE) and not p.name.endswith(".tmp")
        ]
        if strangers:
            raise ValueError(
                f"run.directory: {directory.root} holds other files ({', '.join(sorted(strangers)[:3])}); choose an empty or a new directory"
            )
        return directory
    former = tomllib.loads(read_texts([directory.config])[0])
    _require_same_kind(directory.root, former, config)
    if isinstance(config, LabelConfig):
        differing = differing_keys(_essential_of_job(former), _essential_of_job(config.dump()))
        way_out = "Set these back, or choose another run.directory"
    else:
        former = directory.stored_config()
        ignored = () if directory.selected(0).exists() else ("selection",)  # nothing was chosen by it yet
        differing = differing_keys(_essential(former, ignored), _essential(config.dump(), ignored))
        way_out = (
            "Set these back, or choose another run.directory: they say what its labels mean or which are bought. More "
            "run.rounds, another [student] and another [training] go on here"
        )
    if differing:
        raise ValueError(
            f"{directory.root} was made by another configuration; it differs in {'; '.join(differing)}. {way_out}"
        )
    if isinstance(config, LabelConfig):
        return directory
    from distilbeam.pipelines.jobs.variants import placed  # it is made of run directories

    now = config.dump()
    place = (
        _one_student(directory, former, now) if isinstance(config, TokenRunConfig) else placed(directory, former, now)
    )
    place.moved = tuple(f"data.{name}" for name in DATA if former["data"].get(name) != now["data"].get(name))
    return place


def _one_student(directory: RunDirectory, former: dict[str, Any], now: dict[str, Any]) -> RunDirectory:
    """Check that the student of a language model's run is the one that it was started with: a run has one.

    Raises:
      ValueError: it is another one.
    """
    there, here = (
        {
            "student": config.get("student", {}),
            "training": {
                name: value for name, value in config.get("training", {}).items() if name not in _FREE_OF_TOKENS
            },
        }
        for config in (former, now)
    )
    if differing := differing_keys(there, here):
        raise ValueError(
            f"{directory.root} has a language model of other settings; it differs in {'; '.join(differing)}. Set these back, or train "
            "the other one on the labels that are there: a file with soft_labels = ["
            f"\"{directory.labels(0)}\", ...] in [data], for 'distilbeam launch'"
        )
    return directory


def _require_same_kind(root: Path, former: dict[str, Any], config: AnyConfig) -> None:
    kinds = {True: "a run", False: "a labelling job (without [selection], [student] and [training])"}
    there, now = "student" in former, not isinstance(config, LabelConfig)
    if there != now:
        raise ValueError(
            f"run.directory: {root} holds {kinds[there]}, and the configuration describes {kinds[now]}; choose another "
            "run.directory"
        )


def _essential(config: dict[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    chosen = {
        section: {k: v for k, v in values.items() if (section, k) not in _FREE}
        for section, values in config.items()
        if section not in (*_FREE_SECTIONS, *ignored)
    }
    return chosen | {"engine": {name: config.get("engine", {}).get(name) for name in _ENGINE}}


def _essential_of_job(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how a labelling job's pool is cut; the teacher and the form of labels may change."""
    engine = {name: config.get("engine", {}).get(name) for name in ("unit_rows", "shard_rows")}
    return {"engine": engine, "data": {"id": config["data"].get("id")}}
