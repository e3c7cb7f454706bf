"""Where `inspect` looks for the tokenizer of token labels: in the configuration of the job, or of the run, that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilbeam.pipelines.jobs.label_text import _folder_of_teacher


@pytest.mark.parametrize("labels", ["job/labels", "job/labels/round=000"])
@pytest.mark.parametrize(
    "teacher", ['kind = "causal_lm"\nmodel = "big"', 'kind = "openai"\nmodel = "name"\ntokenizer = "big"']
)
def test_the_teachers_folder_is_found_beside_labels_of_a_job_and_of_a_run(
    tmp_path: Path, labels: str, teacher: str
) -> None:
    (tmp_path / labels).mkdir(parents=True)
    assert _folder_of_teacher(tmp_path / labels) is None
    (tmp_path / "job/config.toml").write_text(f'[run]\ndirectory = "job"\n[teacher]\n{teacher}\n')
    assert _folder_of_teacher(tmp_path / labels) is None  # the folder is gone
    (tmp_path / "big").mkdir()
    assert _folder_of_teacher(tmp_path / labels) == tmp_path / "big"
