"""Text of labels of tokens for `inspect`: the tokenizer that is given, or that of the job's teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.config import load_any_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.storage.paths import to_path
from distilbeam.teacher.config import CausalLMConfig
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
        config = RunDirectory(to_path(dataset).resolve().parent).config
        teacher = load_any_config(config).teacher if config.exists() else None
        if not isinstance(teacher, CausalLMConfig) or not Path(teacher.model).is_dir():
            return None
        folder, setting = Path(teacher.model), "teacher.model"
    spec, found = read_manifest(dataset).spec, load_tokenizer(folder, setting)
    found.require_same(spec.tokenizer, spec.num_classes, dataset)
    return lambda ids: repr(found.tokenizer.decode(list(ids)))[1:-1]
