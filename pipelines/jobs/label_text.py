"""Text of labels of tokens for `inspect`: the tokenizer that is given, or that of the job's teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.config import describes_labelling, parse_label_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.settings import read_toml
from distilbeam.storage.paths import to_path
from distilbeam.teacher.config import CausalLMConfig, OpenAIConfig
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
        folder, setting = _folder_of_teacher(RunDirectory(to_path(dataset).resolve().parent)), "teacher.model"
        if folder is None:
            return None
    spec, found = read_manifest(dataset).spec, load_tokenizer(folder, setting)
    found.require_same(spec.tokenizer, spec.num_classes, dataset)
    return lambda ids: repr(found.tokenizer.decode(list(ids)))[1:-1]


def _folder_of_teacher(job: RunDirectory) -> Path | None:
    """Find the teacher's folder in the configuration of a job, whose paths are as somebody wrote them."""
    if not job.config.exists() or not describes_labelling(data := read_toml(job.config)):
        return None
    config = parse_label_config(data)
    written = Path(config.run.directory)
    base = job.root if written.is_absolute() else job.root.joinpath(*[".."] * len(written.parts)).resolve()
    teacher = config.relative_to(base).teacher
    found = Path(teacher.model) if isinstance(teacher, CausalLMConfig) else None
    found = Path(teacher.tokenizer) if isinstance(teacher, OpenAIConfig) else found
    return found if found is not None and found.is_dir() else None
