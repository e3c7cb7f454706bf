"""The run directory: where each thing of a run is, who works in it, and which configuration it belongs to."""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distilbeam.pipelines.config import LabelConfig, RunConfig, differing_keys, write_config
from distilbeam.pipelines.files import sweep
from distilbeam.pipelines.lease import FOLDER as LEASE
from distilbeam.pipelines.lease import leased
from distilbeam.pipelines.moving import finish_move
from distilbeam.pipelines.remote_pool import is_hidden
from distilbeam.pipelines.units import root_of
from distilbeam.student.train_config import FREE
from distilbeam.teacher.softlabels.atomic import replacing
from distilbeam.teacher.softlabels.places import is_remote, read_texts, within
from distilbeam.teacher.softlabels.placing import commit_all_left

# settings that change no file of a run
_FREE_SECTIONS = ("prices", "tune", "pareto", "watch")
_FREE = (("run", "directory"), ("engine", "attempts"), *(("training", name) for name in FREE))


class RunDirectory:
    """The paths of a run; see the design of the run in the README."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def frozen(self) -> Path:
        """What the run was started with: digests of pool and teacher, class names."""
        return self.root / "frozen.json"

    @property
    def report(self) -> Path:
        """Directory of the report."""
        return self.root / "report"

    @property
    def metrics(self) -> Path:
        """The figures of the final table and of the plots."""
        return self.report / "metrics.json"

    @property
    def work(self) -> Path:
        """What the phases cost, in all calls together."""
        return self.root / "work.json"

    @property
    def uniform(self) -> RunDirectory:
        """The comparison with uniformly chosen labels, laid out like a run."""
        return RunDirectory(self.root / "uniform")

    def asked(self, name: str) -> Path:
        """Directory of the teacher's answers for the validation or the test set."""
        return self.root / "teacher" / name

    @property
    def calibration(self) -> Path:
        """The teacher's temperature, fitted on its answers for the validation set."""
        return self.root / "teacher" / "calibration.json"

    def selected(self, number: int) -> Path:
        """Directory of a round's plan, gains and picks."""
        return self.root / "selected" / f"round={number:03d}"

    def labels(self, number: int) -> Path:
        """Soft-label dataset of a round."""
        return self.root / "labels" / f"round={number:03d}"

    def pooled(self, number: int) -> Path:
        """A round's labels pooled with the beliefs of the student that chose, where a run learns such."""
        return self.root / "pooled" / f"round={number:03d}"

    def summary(self, dataset: Path) -> Path:
        """Totals of a dataset; written when all its shards are committed."""
        return dataset.with_name(f"{dataset.name}.summary.json")

    def dead_letters(self, name: str) -> Path:
        """Directory of the rows that could not be labelled."""
        return self.root / "deadletter" / name

    def gains(self, number: int) -> Path:
        """Directory of the gains that a round's student gave the pool."""
        return self.selected(number) / "gains"

    def picks(self, number: int) -> Path:
        """Directory of the rows that a round chose."""
        return self.selected(number) / "picks"

    def student(self, number: int) -> Path:
        """Checkpoint of the student after `number` rounds."""
        return self.root / "students" / f"round={number:03d}"

    def errors(self, phase: str) -> Path:
        """Directory of the records of items that failed in a phase."""
        return self.root / "errors" / phase


@contextmanager
def opened_run(config: RunConfig | LabelConfig, base: Path) -> Iterator[RunDirectory]:
    """Create or reopen the run directory of a configuration and hold it until the block ends.

    Args:
      config: the configuration.
      base: directory that relative paths are relative to.

    Yields:
      The run directory.

    Raises:
      ValueError: the directory cannot be written, is held by another process, or belongs to another configuration.
    """
    root = within(base, config.run.directory).resolve()
    _check_apart(config, base)
    if is_remote(root) and isinstance(config, RunConfig):
        raise ValueError(
            f"run.directory must be on a file system, a run trains students there; got {root}. Labelling jobs (without "
            "[selection], [student] and [training]) can be in an object store"
        )
    with held(root, "run.directory", "--set run.directory=..."):
        directory = RunDirectory(root)
        _check_config(directory, config)
        if is_remote(root):  # uploads leave nothing under a temporary name
            finish_move(root)
        else:
            from distilbeam.student.training_directory import remove_finished  # takes torch's seconds to import

            sweep(root)
            commit_all_left(root)
            remove_finished(root)
        yield directory


def check_former(config: RunConfig | LabelConfig, base: Path) -> None:
    """Say at once, without holding or making anything, that a run directory belongs to another configuration or is in the pool.

    Of an object store nothing is asked yet.

    Raises:
      ValueError: it does, or is.
    """
    _check_apart(config, base)
    directory = RunDirectory(within(base, config.run.directory))
    if not is_remote(directory.root) and directory.config.exists():
        _check_config(directory, config)


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


def _check_apart(config: RunConfig | LabelConfig, base: Path) -> None:
    root, pool = within(base, config.run.directory), within(base, config.data.pool)
    if is_remote(root) == is_remote(pool):
        require_apart(root, pool, "data.pool")


@contextmanager
def held(root: Path, setting: str, way_out: str) -> Iterator[Path]:
    """Make a directory and hold it against other processes until the block ends.

    On a file system the lock is the system's and ends with the process; see `lease` for an object store.

    Args:
      root: the directory.
      setting: what named it, for errors.
      way_out: the words with which another directory is chosen.

    Yields:
      The directory.

    Raises:
      ValueError: it cannot be written, or another process holds it.
    """
    if is_remote(root):
        with leased(root, setting, way_out):
            yield root
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("a+")
    except OSError as e:
        raise ValueError(f"{setting}: {root} cannot be written ({e.strerror}); choose another with {way_out}") from e
    with lock:
        _hold(lock, root, setting)
        yield root


def _hold(lock: Any, root: Path, setting: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise ValueError(
            f"{root} is being worked on by {holder}; wait for it to end or choose another {setting}"
        ) from e
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()


def _check_config(directory: RunDirectory, config: RunConfig | LabelConfig) -> None:
    if not directory.config.exists():
        strangers = [
            p.name for p in directory.root.iterdir() if p.name not in (".lock", LEASE) and not p.name.endswith(".tmp")
        ]
        if strangers:
            raise ValueError(
                f"run.directory: {directory.root} holds other files ({', '.join(sorted(strangers)[:3])}); choose an empty or a new directory"
            )
        with replacing(directory.config) as temporary:
            write_config(temporary, config)
        return
    former = _with_defaults(tomllib.loads(read_texts([directory.config])[0]), type(config))
    essential = _essential if isinstance(config, RunConfig) else _essential_of_job
    differing = differing_keys(essential(former), essential(config.dump()))
    if differing:
        raise ValueError(
            f"{directory.root} was made by another configuration; it differs in {'; '.join(differing)}. "
            "Set these back, or choose another run.directory"
        )


def _with_defaults(former: dict[str, Any], kind: type[RunConfig] | type[LabelConfig]) -> dict[str, Any]:
    """Add the settings that came later with their defaults, which is how the directory was made."""
    try:
        return kind.model_validate(former).dump()
    except ValidationError:
        return former


def _essential(config: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {k: v for k, v in values.items() if (section, k) not in _FREE}
        for section, values in config.items()
        if section not in _FREE_SECTIONS
    }


def _essential_of_job(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide how a labelling job's pool is cut; the teacher and the form of labels may change."""
    engine = {name: config.get("engine", {}).get(name) for name in ("unit_rows", "shard_rows")}
    return {"engine": engine, "data": {"id": config["data"].get("id")}}
