"""The run directory: where each thing of a run is, and the configuration that is kept there."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig, parse_run_config, write_config
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json
from distilbeam.storage.lease import FOLDER as LEASE
from distilbeam.storage.paths import read_texts

if TYPE_CHECKING:
    from distilbeam.pipelines.pool.datasets import Inputs

VARIANTS = "variants"  # the folder of students of other settings


class RunDirectory:
    """The paths of a run; see "What a run leaves" in docs/guides/run.md."""

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
    def engine_log(self) -> Path:
        """What Beam and a runner that is not this process have said of themselves."""
        return self.root / "engine.log"

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

    def record(self, config: RunConfig | TokenRunConfig | LabelConfig) -> None:
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
            return parse_run_config(former).dump()
        except ValueError:
            return former

    def errors(self, phase: str) -> Path:
        """Directory of the records of items that failed in a phase."""
        return self.root / "errors" / phase
