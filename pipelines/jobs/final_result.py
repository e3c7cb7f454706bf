"""What a run's last training is, where it lies, and what came of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from distilbeam.pipelines.jobs.run import Run
from distilbeam.storage.files import read_json
from distilbeam.student.training.config import LAST

_FORM = (
    "cross-fitted"  # counts in the folder's name: students of another form of the last training are no part of this one
)


def is_wanted(run: Run) -> bool:
    """Tell whether a run has a last training; blind distillation, whose last phase is another one, has none."""
    training = run.config.training
    return training.finetune is None and (training.self_training or learns_validation(run))


def learns_validation(run: Run) -> bool:
    """Tell whether the last training learns the validation rows, on which nothing is measured then."""
    setting = run.config.training.final_training
    return setting == "all" or (setting == "auto" and run.config.data.test is not None)


def final_directory(run: Run) -> Path:
    """Give the folder of the last training after the configuration's rounds."""
    training, test = run.config.training, run.config.data.test is not None
    about = json.dumps([*(getattr(training, name) for name in LAST), test, _FORM], default=str)
    digest = hashlib.blake2b(about.encode(), digest_size=4).hexdigest()
    return run.directory.root / "final" / f"round={run.config.run.rounds:03d}-{digest}"


def final_result(run: Run) -> dict[str, Any] | None:
    """Read what came of the last training; None where the run has none, or not yet."""
    path = final_directory(run) / "final.json"
    if not is_wanted(run) or not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    return found


def final_student(run: Run) -> Path | None:
    """Give the student of the last training; None where there is none, or it is that of a round."""
    found = final_result(run)
    return None if found is None or found["student"] is None else final_directory(run) / found["student"]


def final_sentence(found: dict[str, Any]) -> str:
    """Say what came of the last training; see `FinalTraining.learn`."""
    parts = []
    if (gate := found.get("gate")) is not None:
        rows, before = gate["ensemble"]["rows"], gate["before"]
        if "after" not in gate:
            parts.append("There were no rows left for pseudo-labels")
        else:
            verb = "help and are learned" if gate["kept"] else "do not help and are left out"
            parts.append(
                f"Pseudo-labels of {gate['ensemble']['members']} students for {rows:,} rows that were not bought {verb}: "
                f"{gate['after']['accuracy']:.1%} of the validation rows right with them, {before['accuracy']:.1%} without"
            )
    if found["validation_rows"]:
        said = "The final student has learned the validation rows too, on which it can no longer be measured"
        if (judged := found.get("cross_validated")) is not None:
            said += f"; students of its kind that have not learned them have {judged['accuracy']:.1%} of them right"
        parts.append(said)
    return ". ".join(parts)
