from __future__ import annotations

import pytest
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions, WorkerOptions

from distilbeam.pipelines.engine.beam_options import pipeline_options, spread_over_tasks


@pytest.mark.local_runner(reason="it is the default without another")
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


def test_items_are_spread_over_the_threads_of_a_dask_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apache_beam.runners.dask.dask_runner")
    from apache_beam.runners.dask.dask_runner import DaskOptions

    monkeypatch.setattr("os.cpu_count", lambda: 3)
    options = pipeline_options(["--runner=DaskRunner"])
    sizes = []
    for items in (1, 24, 25, 1000):
        with spread_over_tasks(options, items):
            sizes.append(options.view_as(DaskOptions).partition_size)
    assert sizes == [1, 1, 2, 42]
    assert options.view_as(DaskOptions).partition_size is None
    asked_for = pipeline_options(["--runner=DaskRunner", "--dask_npartitions=4"])
    with spread_over_tasks(asked_for, 1000):
        assert asked_for.view_as(DaskOptions).partition_size is None


def test_the_threads_of_a_running_dask_cluster_are_counted() -> None:
    distributed = pytest.importorskip("dask.distributed")
    from apache_beam.runners.dask.dask_runner import DaskOptions

    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None
    ) as cluster:
        options = pipeline_options(["--runner=DaskRunner", f"--dask_client_address={cluster.scheduler_address}"])
        with spread_over_tasks(options, 49):
            assert options.view_as(DaskOptions).partition_size == 3


def test_other_runners_are_left_alone() -> None:
    options = pipeline_options()
    before = options.get_all_options()
    with spread_over_tasks(options, 1000):
        assert options.get_all_options() == before
