"""Text of labels of tokens for `inspect`: the tokenizer that is given, or that of the teacher of the job or run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.settings import read_toml
from distilbeam.storage.paths import to_path
from distilbeam.teacher.softlabels import read_manifest


def decoder_of(dataset: str, tokenizer: Path | None) -> Callable[[Sequence[int]], str] | None:
    """Make the function that turns ids of a dataset into text.

    Args:
      dataset: labels of tokens.
      tokenizer: folder of their tokenizer; without it that of the teacher in the configuration beside them.

    Returns:
      The function, which shows what text would hide; None where no tokenizer is known.

    Raises:
      ValueError: the folder that is given holds none, or another one.
    """
    folder, setting = tokenizer, "--tokenizer"
    if folder is None:
        folder, setting = _folder_of_teacher(to_path(dataset).resolve()), "teacher.model"
        if folder is None:
            return None
    spec, found = read_manifest(dataset).spec, load_tokenizer(folder, setting)
    found.require_same(spec.tokenizer, spec.num_classes, dataset)
    return lambda ids: repr(found.tokenizer.decode(list(ids)))[1:-1]


def _folder_of_teacher(dataset: Path) -> Path | None:
    """Find the teacher's folder in the configuration of a job or a run, whose paths are as somebody wrote them."""
    # a job's labels lie in its directory, those of a run's round one folder below
    found = (RunDirectory(root) for root in (dataset.parent, dataset.parent.parent))
    job = next((place for place in found if place.config.exists()), None)
    if job is None:
        return None
    data = read_toml(job.config)
    teacher, written = data.get("teacher", {}), Path(data.get("run", {}).get("directory", "."))
    folder = teacher.get("model" if teacher.get("kind") == "causal_lm" else "tokenizer")
    if not isinstance(folder, str):
        return None
    base = job.root if written.is_absolute() else job.root.joinpath(*[".."] * len(written.parts)).resolve()
    place = Path(folder) if Path(folder).is_absolute() else base / folder
    return place if place.is_dir() else None
