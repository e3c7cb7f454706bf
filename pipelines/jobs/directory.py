"""The run directory: where each thing of a run is, who works in it, and which configuration it belongs to.

A run directory belongs to what its labels mean: the data, the teacher, the form of the labels and how they are chosen. More
rounds go on in it; students of other settings learn from its labels in a directory beside its own (`variants.py`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbeam.pipelines.config import LabelConfig, RunConfig, differing_keys, parse_config, write_config
from distilbeam.pipelines.pool.object_store import is_hidden
from distilbeam.pipelines.pool.splits import root_of
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, sweep
from distilbeam.storage.lease import FOLDER as LEASE
from distilbeam.storage.paths import is_remote, read_texts, to_path
from distilbeam.storage.private_folders import remove_left
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels.placing import commit_all_left

if TYPE_CHECKING:
    from distilbeam.pipelines.pool.datasets import Inputs

# where the data are; what they are is frozen by their digests, which are compared where a place is another one
DATA = ("pool", "labelled", "validation")
# settings of [teacher] that say how it is reached and how fast it is asked; what it is has a fingerprint
OPERATION = (
    *("address", "addresses", "batch_rows", "batch_bytes", "parallel", "timeout_s", "attempts", "first_wait_s"),
    *("longest_wait_s", "max_message_bytes", "tls", "ca_file", "cert_file", "key_file", "server_name", "headers"),
    *("threads", "providers", "device"),
)
# settings that change no label of a run, nor which are bought: those of the students, and of how and how long work is done
_FREE_SECTIONS = ("student", "training", "prices", "tune", "pareto", "watch")
_FREE = (
    ("run", "directory"),
    ("run", "rounds"),
    ("run", "accept_weak_teacher"),
    ("selection", "compare_uniform"),
    ("labels", "pooled"),
    ("data", "check_classes"),
    *(("data", name) for name in DATA),
    *(("teacher", name) for name in OPERATION),
)
VARIANTS = "variants"  # the folder of students of other settings
_ENGINE = ("unit_rows", "shard_rows")  # what the names of units and shards depend on


class RunDirectory:
    """The paths of a run; see the design of the run in the README."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moved: tuple[str, ...] = ()  # settings by which the data are in another place than they were

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def frozen(self) -> Path:
        """What the run was started with: digests of pool and teacher, class names."""
        return self.root / "frozen.json"

    def former_classes(self) -> tuple[str, ...]:
        """Return the names of the classes that the run was started with; none where it was not started."""
        return tuple(read_json(self.frozen)["classes"]) if self.frozen.exists() else ()

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
    def top(self) -> Path:
        """The directory of the whole run: this one, but for students beside the run's own."""
        return self.root

    def uniform_with(self, labels: int) -> RunDirectory:
        """The comparison with so many uniformly chosen labels, laid out like a run.

        A run that went on for more rounds has one for each number of labels that its report was about.
        """
        first = RunDirectory(self.root / "uniform")
        plan = first.selected(0) / "plan.json"
        if not plan.exists() or read_json(plan)["budget"] == labels:
            return first
        return RunDirectory(self.root / f"uniform-{labels}")

    def bought_elsewhere(self, rounds: int) -> list[Path]:
        """Labels of pool rows in the whole run that are not those of this directory's first rounds.

        They are of its comparisons, of further rounds and of other students: rows among them need not be asked again.
        """
        places = [self.top, *sorted(self.top.glob("uniform*")), *sorted(self.top.glob(f"{VARIANTS}/*"))]
        found = [dataset for place in places for dataset in sorted((place / "labels").glob("round=???"))]
        mine = {self.labels(number) for number in range(rounds)}
        return [dataset for dataset in found if dataset not in mine and self.summary(dataset).exists()]

    def asked(self, name: str) -> Path:
        """Directory of the teacher's answers for the validation or the test set."""
        return self.root / "teacher" / name

    @property
    def calibration(self) -> Path:
        """The teacher's temperature, fitted on its answers for the validation set."""
        return self.root / "teacher" / "calibration.json"

    @property
    def standing(self) -> Path:
        """Teacher and student 0 on the validation set, compared before the first label is bought."""
        return self.root / "teacher" / "standing.json"

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

    def chooser(self, number: int) -> Path:
        """Checkpoint of the student that chose the examples of a round."""
        return self.student(number)

    def trained(self, rounds: int) -> list[int]:
        """Numbers of the students that are trained for so many rounds."""
        return list(range(rounds + 1))

    def beside(self, rounds: int) -> Path | None:  # noqa: ARG002 - of another student, whose directory answers
        """Checkpoint of the run's own student after so many rounds, where this is another one's directory."""
        return None

    def suited(self, inputs: Inputs) -> Inputs:
        """Give the data the columns that the run's labels carry.

        Raises:
          ValueError: the student reads others.
        """
        return inputs

    def sentence(self, rounds: int) -> str | None:  # noqa: ARG002 - another student's directory says what it learns from
        """Say what is particular about the students here; None where they are the run's own."""
        return None

    def record(self, config: RunConfig | LabelConfig) -> None:
        """Write the resolved configuration where it is new; a run's follows the settings that it may change."""
        if self.config.exists() and (isinstance(config, LabelConfig) or self.stored_config() == config.dump()):
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with replacing(self.config) as temporary:
            write_config(temporary, config)

    def forget_unstarted(self) -> None:
        """Let the directory belong to no configuration again, where what it names was refused before anything was made."""
        ours = (self.config, self.digest_cache)
        there = {path.name for path in self.root.iterdir()} if self.root.exists() else set()
        if there <= {".lock", LEASE, *(path.name for path in ours)}:
            for path in ours:
                path.unlink(missing_ok=True)

    @property
    def digest_cache(self) -> Path:
        """Digests of the content of the pool's files, by what tells that they were not touched."""
        return self.top / "content-digests.json"

    def stored_config(self) -> dict[str, Any]:
        """Read the resolved configuration as plain data, with today's defaults for settings that it did not know."""
        former = tomllib.loads(read_texts([self.config])[0])
        try:
            return parse_config(former).dump()
        except ValueError:
            return former

    def errors(self, phase: str) -> Path:
        """Directory of the records of items that failed in a phase."""
        return self.root / "errors" / phase


@contextmanager
def opened_run(config: RunConfig | LabelConfig) -> Iterator[RunDirectory]:
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
    if is_remote(root) and isinstance(config, RunConfig):
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


def check_former(config: RunConfig | LabelConfig) -> None:
    """Say at once, without holding or making anything, that a run directory belongs to another configuration.

    Of an object store nothing is asked yet.

    Raises:
      ValueError: it does.
    """
    directory = RunDirectory(to_path(config.run.directory))
    if not store_of(directory.root).by_request and directory.config.exists():
        _checked(directory, config)


def planned_run(config: RunConfig | LabelConfig) -> RunDirectory:
    """Give the directory that a configuration would work in, without holding or making anything; see `opened_run`."""
    directory = RunDirectory(to_path(config.run.directory).resolve())
    if isinstance(config, RunConfig) and directory.config.exists():
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


def _check_apart(config: RunConfig | LabelConfig) -> None:
    root, pool = to_path(config.run.directory), to_path(config.data.pool)
    if store_of(root) is store_of(pool):
        require_apart(root, pool, "data.pool")


def _checked(directory: RunDirectory, config: RunConfig | LabelConfig) -> RunDirectory:
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
    place = placed(directory, former, now)
    place.moved = tuple(f"data.{name}" for name in DATA if former["data"].get(name) != now["data"].get(name))
    return place


def _require_same_kind(root: Path, former: dict[str, Any], config: RunConfig | LabelConfig) -> None:
    kinds = {True: "a run", False: "a labelling job (without [selection], [student] and [training])"}
    there, now = "student" in former, isinstance(config, RunConfig)
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
