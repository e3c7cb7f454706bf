"""Search for better settings of a run's student and training; every trial is trained on what the run has labelled."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from distilbeam.pipelines.config import RunConfig, parse_config
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.experiments.further_students import train_further
from distilbeam.pipelines.jobs.run import Run
from distilbeam.progress import Progress
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import write_json
from distilbeam.student.search.space import SearchRange, default_space, nested
from distilbeam.student.search.tuning import CutShort, Objective, Search, Trial, search
from distilbeam.student.training.checkpoints import METRICS, SUFFIX

SECTIONS = ("student", "training")


def tune(run: Run, display: Display) -> Search:
    """Search the configuration's space and write `tune/best.toml`, `tune/results.json` into the run directory.

    Args:
      run: the run.
      display: shows the trials.

    Returns:
      The trials.

    Raises:
      ValueError: a setting of the space that there is not or that cannot have a value of its range; or as for
        `student.tuning.search`.
    """
    config = run.config
    space = dict(config.tune.space) or default_space(config.student)
    _require_valid(config, space)
    root = run.directory.root / "tune"
    about = {"data": run.digest, **{name: _section(config, name, space) for name in SECTIONS}}

    with display.step(f"search {len(space)} settings in {config.tune.trials} trials") as progress:
        found = search(_objective(run, root), space, config.tune, root, config.run.seed, about, progress)
    metric = config.tune.metric
    with replacing(root / "best.toml") as temporary:
        temporary.write_text(_overlay(found.best, metric))
    write_json(root / "results.json", {"metric": metric, "trials": [vars(trial) for trial in found.trials]})
    return found


def plan_search(run: Run) -> str:
    """Say what a search would try, checked as the search checks it; nothing is trained.

    Raises:
      ValueError: as for `tune`.
    """
    config = run.config
    space = dict(config.tune.space) or default_space(config.student)
    _require_valid(config, space)
    trials = (run.directory.root / "tune" / "trials").glob("*")
    trained = sum(path.suffix != SUFFIX for path in trials)
    return (
        f"{config.tune.trials:,} trials over {', '.join(space)}; {trained:,} trained already. Each trains a student on what the "
        "run has labelled, and asks no teacher."
    )


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with some of its settings changed, validated."""
    data = config.dump()
    for name, value in settings.items():
        *path, key = name.split(".")
        section = data
        for part in path:
            section = section.setdefault(part, {})
        section[key] = value
    made = parse_config(data)
    return made if config.folder is None else made.relative_to(config.folder)


def _objective(run: Run, root: Path) -> Objective:
    metric = f"validation_{run.config.tune.metric}"

    def objective(settings: Mapping[str, Any], progress: Progress) -> float:
        config = with_settings(run.config, settings)
        digest = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=8).hexdigest()
        directory = root / "trials" / digest
        if directory.exists():  # a killed search had trained it to its end: the search learns its epochs now
            _tell_epochs(directory / METRICS, progress)
        try:
            metrics = train_further(run, config.student, config.training, directory, progress)
        except CutShort:
            shutil.rmtree(directory.with_name(directory.name + SUFFIX))
            raise
        return metrics[metric]

    return objective


def _tell_epochs(lines: Path, progress: Progress) -> None:
    """Tell the epochs of a training that ended, as it told them itself: the last is followed by no step."""
    figures = [json.loads(line) for line in lines.read_text().splitlines()]
    for epoch in [line for line in figures if "epoch" in line][:-1]:
        progress.epoch(epoch["epoch"], epoch)
    progress.step(1, 1)


def _require_valid(config: RunConfig, space: Mapping[str, SearchRange]) -> None:
    for name, values in space.items():
        if name.split(".")[0] not in SECTIONS:
            raise ValueError(f"tune.space may hold settings of [student] and [training], got {name}")
        for value in values.choices or (values.low, values.high):
            with_settings(config, {name: value})


def _section(config: RunConfig, name: str, space: Mapping[str, SearchRange]) -> dict[str, Any]:
    """Return the settings of a section that are not searched."""
    data: dict[str, Any] = copy.deepcopy(config.dump()[name])
    for setting in space:
        section, *path, key = setting.split(".")
        inner: Any = data if section == name else {}
        for part in path:
            inner = inner.get(part, {})
        inner.pop(key, None)
    return data


def _overlay(best: Trial, metric: str) -> str:
    return f"# the best of the search: validation {metric} {best.value:.6g}; use it with --set @FILE\n" + tomli_w.dumps(
        nested(best.settings)
    )
