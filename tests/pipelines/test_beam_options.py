from __future__ import annotations

import pytest
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions, WorkerOptions

from distilbeam.pipelines.beam_options import pipeline_options


def test_the_local_runner_is_named() -> None:
    assert pipeline_options().view_as(StandardOptions).runner == "FnApiRunner"


def test_options_reach_beam() -> None:
    options = pipeline_options(
        ["--direct_running_mode=multi_processing", "--direct_num_workers", "2", "--max_num_workers=7"]
    )
    assert options.view_as(DirectOptions).direct_running_mode == "multi_processing"
    assert options.view_as(DirectOptions).direct_num_workers == 2
    assert options.view_as(WorkerOptions).max_num_workers == 7
    assert pipeline_options(["--runner=DataflowRunner"]).view_as(StandardOptions).runner == "DataflowRunner"
    assert pipeline_options(["--runner", "FlinkRunner"]).view_as(StandardOptions).runner == "FlinkRunner"


def test_dask_is_known_by_its_short_name() -> None:
    pytest.importorskip("dask", reason="the Dask runner needs the extra 'dask'")
    options = pipeline_options(["--runner=DaskRunner", "--dask_npartitions=4"])
    assert options.view_as(StandardOptions).runner.endswith("DaskRunner")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max_num_worker=3"], r"--max_num_worker is not a Beam option; did you mean --max_num_workers\?"),
        (
            ["--direct_num_worker", "2"],
            r"--direct_num_worker is not a Beam option; did you mean --direct_num_workers\?",
        ),
        (["--zzz"], r"--zzz is not a Beam option; see Beam's documentation"),
        (["extra"], r"'extra' is not a Beam option: what follows '--' must be flags"),
        (
            ["--direct_num_workers=two"],
            r"Beam refuses the options after '--': argument --direct_num_workers: invalid int value: 'two'",
        ),
    ],
)
def test_what_beam_would_pass_over_is_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        pipeline_options(flags)
