"""The freeze of a run: digests of its data and the fingerprint of its teacher, which must stay what they were at its start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from distilbeam.pipelines.acquisition.score import gains_file
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.pool.content_digests import content_digests
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.storage.files import read_json, write_json

log = logging.getLogger(__name__)


class FrozenInputs(Protocol):
    """The data of a run, as far as they must stay what they were."""

    @property
    def pool(self) -> Pool:
        """The units of the pool."""
        ...

    @property
    def rows_digests(self) -> dict[str, str]:
        """Hash of the rows of each other set, by the setting that names it."""
        ...

    @property
    def files_digest(self) -> str:
        """Hash of all footers."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none of tokens."""
        ...


class FrozenRun(Protocol):
    """A run that belongs to its data and its teacher."""

    directory: RunDirectory

    @property
    def inputs(self) -> FrozenInputs:
        """The data."""
        ...

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint."""
        ...


def freeze(run: FrozenRun, check_content: bool = False) -> None:
    """Record which data and which teacher the run belongs to, or check that they are still the same.

    Args:
      run: the run; its directory is held by this process.
      check_content: read all files of the pool, not only those that were touched since.

    Raises:
      ValueError: the data or the teacher changed since the run was started.
    """
    now = _data(run) | {
        "teacher": run.fingerprint,
        "contents": content_digests(run.inputs.pool, run.directory.digest_cache, check_content),
    }
    path = run.directory.frozen
    if not path.exists():
        write_json(path, now)
    then = _with_mended_files(run, read_json(path), now)
    if then["teacher"] != now["teacher"]:
        raise ValueError(
            f"the teacher changed: {run.directory.root} was started with {then['teacher']}, the configuration now "
            f"names {now['teacher']}; put the former back or choose another run.directory"
        )
    if changed := _changed(then, now):
        raise ValueError(
            f"the data changed since {run.directory.root} was started: {changed}; put it back or choose another run.directory"
        )
    if "sets" not in then:
        log.warning(
            "%s was started by an earlier version, which did not record the rows of the labelled sets: whether they were "
            "changed until now cannot be told",
            run.directory.root,
        )
    if "sets" not in then or "contents" not in then:
        write_json(path, {**then, **{name: now[name] for name in ("pool", "sets", "contents")}})


def require_data_of_run(run: FrozenRun) -> None:
    """Check of data in another place than they were, by footers and the labelled sets' rows, that they are the run's.

    Raises:
      ValueError: they are others.
    """
    frozen = run.directory.frozen
    if run.directory.moved and frozen.exists() and _changed(read_json(frozen), _data(run) | {"contents": {}}):
        raise ValueError(
            f"{' and '.join(run.directory.moved)} must lead to the data that {run.directory.top} was started with, these "
            "are others; set it back or choose another run.directory"
        )


def changed_files(directory: RunDirectory, pool: Pool) -> list[str]:
    """Read all files of a run's pool and list those that are not what the run was started with."""
    then = read_json(directory.frozen).get("contents", {})
    now = content_digests(pool, directory.digest_cache, check_all=True)
    return [name for name, digest in now.items() if then.get(name, digest) != digest]


def _data(run: FrozenRun) -> dict[str, Any]:
    """Describe the data by what is read anyway: footers of the pool, rows of the labelled sets."""
    return {
        "inputs": run.inputs.files_digest,
        "pool": run.inputs.pool.digest,
        "sets": run.inputs.rows_digests,
        "files": dict(run.inputs.pool.files),
        "classes": list(run.inputs.classes),
    }


def _with_mended_files(run: FrozenRun, then: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Take pool files of other values as long as nothing was chosen by them: one that was damaged may be put right."""
    known = then.get("contents", {})
    mended = {name for name, digest in now["contents"].items() if known.get(name, digest) != digest}
    where = run.directory
    if not mended or then.get("pool") != now["pool"] or (where.selected(0) / "plan.json").exists():
        return then
    log.warning("%s: values changed before anything was chosen, its rows are scored again", ", ".join(sorted(mended)))
    paths = {path for name, path in run.inputs.pool.paths if name in mended}
    for unit in run.inputs.pool.units:
        if unit.path in paths:
            gains_file(where.gains(0), unit).unlink(missing_ok=True)
    taken = {**then, "contents": now["contents"]}
    write_json(where.frozen, taken)
    return taken


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what changed since a run was started; nothing where all is the same."""
    if then["classes"] != now["classes"]:
        return "the classes of the labelled sets"
    if "sets" in then:
        sets = [name for name, digest in now["sets"].items() if digest != then["sets"].get(name)]
        if then["pool"] == now["pool"]:
            known = then.get("contents", {})
            values = [name for name, digest in now["contents"].items() if known.get(name, digest) != digest]
            return ", ".join(sets + [f"values in pool file {name}" for name in values[:3]])
    elif then["inputs"] == now["inputs"]:
        return ""
    files = sorted({name for name, _ in {*then["files"].items()} ^ {*now["files"].items()}})
    return f"pool file(s) {', '.join(files)}" if files else "a labelled set"
