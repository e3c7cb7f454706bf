"""Students beside those of a run's rounds: trained on all that the run has labelled, and judged on its labelled sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distilbeam.pipelines.experiments.model_metrics import cost, logits_of
from distilbeam.pipelines.jobs.run import Run
from distilbeam.progress import Progress
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate, per_class
from distilbeam.student.export.load import load_model
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import AugmentConfig, TrainConfig


def train_further(
    run: Run,
    student: StudentConfig,
    training: TrainConfig,
    directory: Path,
    progress: Progress,
    *,
    labels: bool = True,
    init: Path | None = None,
) -> dict[str, float]:
    """Train a student on a run's data; one that was killed goes on, one that is there is left. The teacher is not asked.

    Args:
      run: the run.
      student: what to train.
      training: how; a second phase for pools of another distribution is left out.
      directory: where it appears.
      progress: shows the progress.
      labels: learn from the soft labels too; without them neither augmentation nor another objective is used, which
        is the network before learning techniques improve it.
      init: student to start from.

    Returns:
      The metrics of the training.
    """
    if directory.exists():
        return dict(load_student(directory).extra["metrics"])
    changes: dict[str, Any] = {"finetune": None}
    if not (labels and run.soft_labels):
        changes |= {"objective": "distill", "reestimate_epochs": None}
    if not labels:
        changes |= {"augment": AugmentConfig()}
    training = training.model_copy(update=changes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    soft_labels = run.soft_labels if labels else []
    return run.train(directory, soft_labels, progress, student=student, training=training, init=init).metrics


def judge_on_run(run: Run, directory: Path, *, learned_validation: bool = False) -> dict[str, Any]:
    """Evaluate a student or an export on a run's validation and test set, and measure its footprint.

    Args:
      run: the run.
      directory: of the student or the export.
      learned_validation: whether the student has learned the validation set, whose figures are left out then.

    Returns:
      `validation` and, where there is a test set, `test`, as `student.evaluate.evaluate` gives them; `classes`, as `per_class`
      gives them of the last of these sets, whose name is `classes_on`; and the footprint.
    """
    model = load_model(directory)
    figures: dict[str, Any] = {}
    sets = ("validation",) if run.config.data.test is None else ("validation", "test")
    for name in sets[learned_validation:]:
        answers = run.answers(name) if run.was_asked(name) else None
        logits, truth = logits_of(model, run.labelled_set(name).table), run.truth(name)
        figures |= {
            name: evaluate(logits, truth, answers),
            "classes": per_class(logits, truth, model.classes),
            "classes_on": name,
        }
    return {**figures, **cost(directory, model)}
