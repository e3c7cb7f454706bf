"""The sweep behind the Pareto front: every student of the plan made, compressed and judged once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy.typing as npt

from distilbeam.extras import require_extras
from distilbeam.pipelines.config import RunConfig, differing_keys
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.experiments.further_students import judge_on_run, train_further
from distilbeam.pipelines.experiments.model_metrics import pool_examples
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.needs import needs_of_sweep
from distilbeam.pipelines.report.plots import draw_pareto
from distilbeam.progress import Progress
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.prune import prune_student, require_prunable
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.search.pareto import Stage, front, plan

WITH_WIDTH = ("mlp", "cnn", "resnet", "text", "transformer")
WIDEST = 16.0
CALIBRATION_ROWS = 1024
SHOWN_METRICS = ("accuracy", "nll", "ece", "agreement")


def sweep_widths(run: Run, display: Display) -> dict[str, Any]:
    """Make the students of `[pareto]`, or what is left of them, and find the front.

    The front is found on the validation set; the figures on the test set stand beside it. Everything is in the run
    directory's `pareto/`: the students, a file of figures for each, `pareto.json` and `pareto.png`.

    Args:
      run: the run.
      display: shows the stages.

    Returns:
      The contents of `pareto.json`: `cost`, and `points` with their figures and `on_front`.

    Raises:
      ValueError: nothing is labelled yet, the network has no width or cannot be pruned, or the directory was made with
        other settings.
    """
    config, root = run.config, run.directory.root / "pareto"
    stages = _checked_stages(run)
    _require_same_settings(root, run)

    points = []
    for stage in stages:
        figures = root / f"{stage.name}.json"
        if not figures.exists():
            with display.step(_title(stage)) as progress:
                directory = _make(stage, root, run, progress)
                write_json(figures, judge_on_run(run, directory))
        if stage.shown:
            points.append(_point(stage, read_json(figures)))
    cost = config.pareto.cost
    for point, chosen in zip(points, front(points, cost, "accuracy"), strict=True):
        point["on_front"] = chosen
    results = {"cost": cost, "points": points, "test": config.data.test is not None, "teacher": _teacher(run)}
    write_json(root / "pareto.json", results)
    draw_pareto(results, root)
    return results


def plan_sweep(run: Run) -> str:
    """Say what a sweep would make, checked as the sweep checks it; nothing is made.

    Raises:
      ValueError: as for `sweep_widths`, but for a directory of other settings.
    """
    stages, root = _checked_stages(run), run.directory.root / "pareto"
    left = [stage for stage in stages if not (root / f"{stage.name}.json").exists()]
    trained = sum(stage.action != "compress" for stage in left)
    names = f": {', '.join(stage.name for stage in left)}" if left else ""
    return (
        f"{len(stages):,} students, {len(stages) - len(left):,} there already; {trained:,} would be trained and {len(left) - trained:,} "
        f"compressed{names}. Each learns what the run has labelled, and no teacher is asked."
    )


def _checked_stages(run: Run) -> list[Stage]:
    config = run.config
    require_extras(needs_of_sweep(config.pareto))
    stages = plan(config.pareto)
    run.require_soft_labels("the sweep compares students before and after they learn from soft labels")
    _require_widths(config, stages)
    if any(stage.action == "prune" for stage in stages):
        _require_prunable(run)
    return stages


def _make(stage: Stage, root: Path, run: Run, progress: Progress) -> Path:
    directory, training = root / stage.name, run.config.training
    if directory.exists():
        return directory
    if stage.action == "train":
        train_further(run, _widened(run, stage.built), training, directory, progress, labels=stage.labels)
    elif stage.action == "prune":
        assert stage.source is not None
        cut = root / f"{stage.name}-untrained"
        if not cut.exists():
            prune_student(root / stage.source, 1 - stage.width / stage.built, cut)
        short = training.model_copy(update={"epochs": max(1, round(run.config.pareto.recovery * training.epochs))})
        train_further(run, load_student(cut).config, short, directory, progress, init=cut)
    else:
        assert stage.source is not None
        origin = {"pool": run.config.dump()["data"]["pool"], "seed": run.config.run.seed}
        examples, made_from = _examples(run, CALIBRATION_ROWS), run.provenance()
        export_student(root / stage.source, stage.form, directory, examples, origin, made_from)
    return directory


def _widened(run: Run, factor: float) -> StudentConfig:
    return run.student_config(width=run.config.student.width * factor)


def _point(stage: Stage, figures: dict[str, Any]) -> dict[str, Any]:
    validation = {name: figures["validation"][name] for name in SHOWN_METRICS if name in figures["validation"]}
    test = {f"test_{name}": figures["test"][name] for name in SHOWN_METRICS if name in figures.get("test", {})}
    footprint = {
        name: value for name, value in figures.items() if name not in ("validation", "test", "classes", "classes_on")
    }
    about = {"name": stage.name, "strategy": stage.strategy, "width": stage.width, "form": stage.form}
    return {**about, **validation, **test, **footprint}


def _title(stage: Stage) -> str:
    if stage.action == "compress":
        return f"{stage.source}: {stage.form}"
    if stage.action == "prune":
        return f"prune {stage.source} to width {stage.width:g} and train it"
    how = "on soft labels" if stage.labels else "on human labels alone"
    return f"train width {stage.built:g} {how}"


def _teacher(run: Run) -> float | None:
    """Give the teacher's accuracy on the validation set, where it was asked."""
    return 1 - run.wrong_share if run.was_asked("validation") else None


def _examples(run: Run, rows: int) -> npt.NDArray[Any]:
    return pool_examples(run.inputs.pool, run.student_config().input, rows, run.config.run.seed)


def _require_widths(config: RunConfig, stages: list[Stage]) -> None:
    if config.student.kind not in WITH_WIDTH:
        raise ValueError(
            f"a sweep needs a student with a width, which are {', '.join(WITH_WIDTH)}; got student.kind "
            f"{config.student.kind!r}"
        )
    widest = max(stage.built for stage in stages) * config.student.width
    if widest > WIDEST:
        raise ValueError(
            f"the widest network of the sweep must have a width of at most {WIDEST:g}, got {widest:g}; take smaller "
            "pareto.widths or a smaller pareto.grow"
        )


def _require_prunable(run: Run) -> None:
    """Build the network and look at it before hours go into training a wide one."""
    shape = _examples(run, 1).shape[1:]
    try:
        require_prunable(build_student(run.student_config(), shape, len(run.inputs.classes)))
    except ValueError as e:
        raise ValueError(f"{e}; or set pareto.strategies = ['shrink-and-improve']") from e


def _require_same_settings(root: Path, run: Run) -> None:
    """Check that the students there were made from the same data with the same settings; more widths may be added."""
    config = run.config.dump()
    now = {
        "data": run.digest,
        "student": config["student"],
        "training": config["training"],
        "pareto": {name: config["pareto"][name] for name in ("grow", "recovery")},
        "seed": run.config.run.seed,
    }
    path = root / "made-with.json"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    former = read_json(path)
    if differing := differing_keys(former, json.loads(json.dumps(now))):
        raise ValueError(
            f"{root} was made with other settings, which differ in {'; '.join(differing)}. Set these back, or remove the "
            "directory to begin anew (data: the labels that students learn from; more rounds make them others)"
        )
