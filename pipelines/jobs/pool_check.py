"""The check of a pool for `verify`: it still holds what its labels were made of."""

from __future__ import annotations

from pathlib import Path

from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig, load_any_config
from distilbeam.pipelines.jobs.blocks import COLUMNS
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.freeze import changed_files
from distilbeam.pipelines.jobs.labelling import LabellingJob
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.settings import read_toml
from distilbeam.storage.paths import to_path


def pool_problems(config: Path, dataset: str) -> list[str]:
    """Compare a pool with what was labelled of it, reading all of its files.

    Args:
      config: configuration of the run or labelling job; one without [data], or of another dataset, is passed over.
      dataset: the labels.

    Returns:
      A sentence where something changed, or nothing.

    Raises:
      ValueError: the configuration is not valid, or its pool is not there.
    """
    if "data" not in read_toml(config):
        return []
    settings = load_any_config(config)
    directory = RunDirectory(to_path(settings.run.directory).resolve())
    labels = to_path(dataset).resolve()
    if isinstance(settings, LabelConfig):
        job = LabellingJob(settings, directory)
        changed = job.changed_files() if labels == job.dataset.resolve() else []
        way_out = "'distilbeam label' asks its changed rows again"
    else:
        ours = labels.is_relative_to(directory.root) and directory.frozen.exists()
        changed = changed_files(directory, _pool(settings, directory)) if ours else []
        way_out = "put it back, or start a new run.directory"
    if not changed:
        return []
    more = ", …" if len(changed) > 3 else ""
    return [f"{len(changed):,} file(s) hold other values than were labelled: {', '.join(changed[:3])}{more}; {way_out}"]


def _pool(settings: RunConfig | TokenRunConfig, directory: RunDirectory) -> Pool:
    if isinstance(settings, TokenRunConfig):
        return plan_pool(to_path(settings.data.pool), settings.engine.unit_rows, "data.pool", COLUMNS)
    return Run(settings, directory).inputs.pool
