"""Search for the settings of a training with Optuna.

Trials are drawn by a tree-structured Parzen estimator that learns from those that ended; one that is worse than the
median of the others at the same epoch is cut short. The study is a journal on disk: a search that was killed goes on
with the trial it was at, and ends as one that was not, because the generator of each trial depends on the seed and on
the number of trials that ended before it, and on nothing else.

References:
  Akiba et al., Optuna: A Next-generation Hyperparameter Optimization Framework, arXiv:1907.10902.
  Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011 (tree-structured Parzen estimator).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilbeam.progress import Progress
from distilbeam.student.search.space import SearchRange, TuneConfig
from distilbeam.student.training.checkpoints import differing_settings

JOURNAL = "journal.log"
GIVE_UP_AFTER = 3

Objective = Callable[[Mapping[str, Any], Progress], float]


class CutShort(Exception):  # noqa: N818 - no error: the search has seen enough of a trial
    """Raised by a trial's progress to end it."""


@dataclass(frozen=True)
class Trial:
    """A trial that ended.

    Attributes:
      settings: dotted names and values.
      state: `complete`, `cut` or `failed`.
      value: the metric; None if the trial failed.
      epochs: reports that it made.
      error: why it failed.
    """

    settings: dict[str, Any]
    state: str
    value: float | None
    epochs: int
    error: str | None


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
      best: the best complete trial.
      trials: all of them, in the order in which they began.
    """

    best: Trial
    trials: tuple[Trial, ...]


def search(
    objective: Objective,
    space: Mapping[str, SearchRange],
    config: TuneConfig,
    directory: Path,
    seed: int,
    about: Mapping[str, Any],
    progress: Progress | None = None,
) -> Search:
    """Try settings until there are enough trials; trials of a search that was killed count.

    Args:
      objective: trains with the settings it is given and returns the metric; it tells the progress it is given every step
        and every epoch, as `train` does, which may raise `CutShort`. It raises `ValueError` where the settings do not train.
      space: dotted settings and their ranges.
      config: trials, metric and cutting.
      directory: of the journal; made if it is not there. One process at a time may work in it.
      seed: with the number of trials that ended it decides a trial's settings.
      about: what else decides the outcome, as plain data; a journal about something else is refused.
      progress: told the trials that ended and all trials.

    Returns:
      The trials and the best of them.

    Raises:
      ValueError: Optuna is not installed, the journal belongs to another search, or the first trials all failed.
    """
    optuna, progress = _library(), progress or Progress()
    directory.mkdir(parents=True, exist_ok=True)
    study = _study(
        optuna, directory, config, seed, dict(about) | {"space": _plain(space), "metric": config.metric, "seed": seed}
    )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of a process that was killed: drawn again below
    while (ended := len(_ended(study))) < config.trials:
        progress.step(ended, config.trials)
        study.sampler = optuna.samplers.TPESampler(seed=_seed(seed, ended), n_startup_trials=config.startup)
        _carry_out(optuna, study, objective, space, f"validation_{config.metric}")
        _give_up_early(study)
    progress.step(config.trials, config.trials)
    trials = tuple(_summary(trial) for trial in _ended(study))
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        raise ValueError(
            f"none of the {len(trials)} trials was completed: {trials[-1].error}; widen the ranges or give it more"
        )
    sign = 1 if config.metric == "nll" else -1
    return Search(min(complete, key=lambda trial: sign * (trial.value or 0.0)), trials)


def _carry_out(optuna: Any, study: Any, objective: Objective, space: Mapping[str, SearchRange], metric: str) -> None:
    trial = study.ask()
    settings = {name: _suggest(trial, name, values) for name, values in space.items()}
    try:
        value = objective(settings, _TrialProgress(trial, metric))
    except CutShort:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except ValueError as e:
        trial.set_user_attr("error", str(e))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, value)


class _TrialProgress(Progress):
    """Passes a trial's epochs on to Optuna, each with the first step after it.

    An epoch that no step follows is the last one: what it came to is the value of the whole trial, which is not cut any more.
    """

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric
        self._ended: list[tuple[int, float]] = []

    def step(self, done: int, total: int, note: str = "") -> None:  # noqa: ARG002
        while self._ended:
            number, value = self._ended.pop(0)
            self._trial.report(value, number)
            if self._trial.should_prune():
                raise CutShort

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._ended.append((number, figures[self._metric]))


def _library() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise ValueError("a search needs Optuna; install distilbeam[tune]") from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, directory: Path, config: TuneConfig, seed: int, about: Mapping[str, Any]) -> Any:
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    journal = directory / JOURNAL
    journal.with_name(JOURNAL + ".lock").unlink(missing_ok=True)  # of a process that was killed while it held it
    lock = JournalFileOpenLock(str(journal))
    study = optuna.create_study(
        study_name="tune",
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=lock)),
        direction="minimize" if config.metric == "nll" else "maximize",
        pruner=_pruner(optuna, config),
        sampler=optuna.samplers.TPESampler(seed=seed),
        load_if_exists=True,
    )
    if "about" not in study.user_attrs:
        study.set_user_attr("about", about)
    former = study.user_attrs["about"]
    if differing := differing_settings(former, json.loads(json.dumps(about))):
        raise ValueError(
            f"{journal} belongs to another search, which differs in {'; '.join(differing)}. Set these back, or remove {directory} "
            "to begin anew (data: the labels that students learn from; more rounds make them others)"
        )
    return study


def _pruner(optuna: Any, config: TuneConfig) -> Any:
    if not config.cut:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=config.startup, n_warmup_steps=config.patience)


def _suggest(trial: Any, name: str, values: SearchRange) -> Any:
    if values.choices:  # as text, so that a choice may be a list
        return json.loads(trial.suggest_categorical(name, [json.dumps(choice) for choice in values.choices]))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _plain(space: Mapping[str, SearchRange]) -> dict[str, Any]:
    return {name: values.model_dump(mode="json", exclude_defaults=True) for name, values in space.items()}


def _seed(seed: int, ended: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{ended}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _ended(study: Any) -> list[Any]:
    """List the trials that count: all but those that a killed process left behind."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and _state(t) != "left"]


def _state(trial: Any) -> str:
    names = {"COMPLETE": "complete", "PRUNED": "cut", "FAIL": "failed" if "error" in trial.user_attrs else "left"}
    return names[trial.state.name]


def _summary(trial: Any) -> Trial:
    settings = {name: json.loads(value) if isinstance(value, str) else value for name, value in trial.params.items()}
    values = trial.intermediate_values
    value = trial.value if trial.state.name == "COMPLETE" else values[max(values)] if values else None
    return Trial(settings, _state(trial), value, len(values), trial.user_attrs.get("error"))


def _give_up_early(study: Any) -> None:
    """Stop a search whose first trials all failed: it is not the settings that are wrong."""
    ended = _ended(study)
    if len(ended) >= GIVE_UP_AFTER and all(_state(trial) == "failed" for trial in ended):
        raise ValueError(f"the first {len(ended)} trials all failed, the last with: {ended[-1].user_attrs['error']}")
