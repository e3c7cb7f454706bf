"""Ways of labelling a pool: loops without an engine, ours on every local runner, and other people's."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.pipelines.config import LabelConfig, parse_label_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.forkserver import local_runner
from distilbeam.pipelines.engine.worker_pool import WorkerPool
from distilbeam.pipelines.jobs.labelling import LabellingJob, opened_job
from distilbeam.progress import Progress
from distilbeam.teacher.softlabels import SoftLabelSpec, encode
from distilbeam.teacher.softlabels.columns import parquet_options
from measuring.pools import Teacher

BATCH = 16384  # rows that the teacher is asked about at a time
READ = 65536  # rows that the plain loop reads and writes at a time, the best of several sizes: a whole row group
PRISM, PRISM_2 = "distilbeam, Prism", "distilbeam, Prism, 2 workers"
PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


@dataclass(frozen=True)
class Task:
    """What is labelled: a pool, its teacher, and where the labels go."""

    pool: Path
    columns: tuple[str, ...]
    features: int
    classes: int
    output: Path
    teacher_batch: int = BATCH
    seconds_per_call: float = 0.0

    def model(self) -> torch.nn.Module:
        """Make the teacher as a loop of one's own would."""
        return Teacher(self.features, self.classes, self.seconds_per_call)

    def config(self) -> LabelConfig:
        """Describe the same work to distilbeam."""
        arguments = {"features": self.features, "classes": self.classes, "seconds": self.seconds_per_call}
        teacher = {
            "kind": "torch",
            "model": "measuring.pools:Teacher",
            "arguments": arguments,
            "input": {"columns": self.columns, "shape": [self.features]},
        }
        return parse_label_config(
            {
                "run": {"directory": str(self.output)},
                "data": {"pool": str(self.pool), "id": "id", "num_classes": self.classes},
                "teacher": teacher,
                "engine": {"teacher_batch": self.teacher_batch},
            }
        )


def teacher_alone(task: Task) -> None:
    """Ask the teacher as often as the pool's rows need, about the same rows again and again, and keep nothing."""
    model = task.model()
    rows = sum(pq.read_metadata(file).num_rows for file in task.pool.glob("*.parquet"))
    inputs = np.zeros((task.teacher_batch, task.features), np.float32)
    for start in range(0, rows, task.teacher_batch):
        _ask(model, inputs[: rows - start])


def plain_loop(task: Task, processes: int = 1) -> None:
    """Read, ask, encode and write, a file per row group, with nothing around: the limit."""
    task.output.mkdir(parents=True, exist_ok=True)
    model = task.model()
    groups = [(file, group) for file in sorted(task.pool.glob("*.parquet")) for group in _groups(file)]
    if processes == 1:
        for file, group in groups:
            _label_group(task, model, file, group)
        return
    workers = [
        multiprocessing.get_context("fork").Process(target=_label_groups, args=(task, model, groups[i::processes]))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def distilbeam(task: Task, *flags: str) -> None:
    """Label by a labelling job, manifest, checksums and flushing to disk included."""
    with opened_job(task.config().relative_to(task.output.parent)) as job:
        _label(job, flags)


def distilbeam_on_dask(task: Task) -> None:
    """Label by a labelling job on a Dask cluster of two worker processes; the start of the cluster is not measured."""
    with opened_job(task.config().relative_to(task.output.parent)) as job:
        _label(job, ("--runner=DaskRunner", f"--dask_client_address={_cluster().scheduler_address}"))


def _label(job: LabellingJob, flags: tuple[str, ...]) -> None:
    job.label(job.plan(), pipeline_options(flags), Progress())


_clusters: list[Any] = []


def _cluster() -> Any:
    """Start the cluster once."""
    if not _clusters:
        from dask.distributed import LocalCluster

        _clusters.append(LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None))
    return _clusters[0]


def distilbeam_on_prism(task: Task, *flags: str) -> None:
    """Label by a labelling job on Prism, its start and its end included."""
    distilbeam(task, "--runner=PrismRunner", *flags)


def distilbeam_on_prism_workers(task: Task) -> None:
    """Label on Prism with two worker processes of `distilbeam workers`, which a person would have running."""
    (pool,) = _pools
    external = ("--environment_type=EXTERNAL", f"--environment_config={pool.address}", "--sdk_worker_parallelism=2")
    distilbeam_on_prism(task, *external)


_pools: list[Any] = []


def run_inference(task: Task, batched: bool) -> None:
    """Label by Beam's RunInference: rows as dictionaries, or Arrow batches on the way in and out."""
    import apache_beam as beam

    from measuring.beam_peers import label_batched, label_rows

    with beam.Pipeline(options=pipeline_options()) as pipeline:
        (label_batched if batched else label_rows)(pipeline, task)


def ray_data(task: Task) -> None:
    """Label by Ray Data with two actors; the start of Ray is not measured."""
    import ray

    class Actor:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.model = task.model()

        def __call__(self, batch: pa.Table) -> pa.Table:
            labels = encode(_ask(self.model, _inputs(batch, task)), _spec(task))
            return pa.table({"example_id": batch["id"], **dict(zip(labels.schema.names, labels.columns, strict=True))})

    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.read_parquet(str(task.pool), columns=["id", *task.columns])
    labelled = pool.map_batches(Actor, batch_size=BATCH, batch_format="pyarrow", concurrency=2)
    labelled.write_parquet(str(task.output))


WAYS: dict[str, Callable[[Task], None]] = {
    "plain loop": plain_loop,
    "plain loop, 2 processes": lambda task: plain_loop(task, 2),
    "distilbeam": distilbeam,
    "distilbeam, 2 threads": lambda task: distilbeam(
        task, "--direct_running_mode=multi_threading", "--direct_num_workers=2"
    ),
    "distilbeam, 2 processes": lambda task: distilbeam(task, *PROCESSES),
    PRISM: distilbeam_on_prism,
    PRISM_2: distilbeam_on_prism_workers,
    "distilbeam, Dask with 2 processes": distilbeam_on_dask,
    "RunInference + WriteToParquet": lambda task: run_inference(task, batched=False),
    "RunInference + WriteToParquetBatched": lambda task: run_inference(task, batched=True),
    "Ray Data, 2 actors": ray_data,
}


def prepare(way: str) -> None:
    """Start what a person would have running already: a Dask or Ray cluster, a pool of workers; import what workers are forked with."""
    if way == "distilbeam, 2 processes":
        local_runner(pipeline_options(PROCESSES))
    if way == PRISM_2:
        _pools.append(WorkerPool(2))
        _pools[0].start()
    if "Dask" in way:
        _cluster().get_client().run(_imported)  # by every worker
    if "Ray" in way:
        import ray

        # One more than there are actors: the tasks that read and write wait for ever otherwise.
        ray.init(num_cpus=3, include_dashboard=False, logging_level="error", log_to_driver=False)


def clean_up(task: Task) -> None:
    """Remove the labels, and end what `prepare` started."""
    shutil.rmtree(task.output, ignore_errors=True)
    for cluster in _clusters:
        cluster.close()
    _clusters.clear()
    for pool in _pools:
        pool.stop()
    _pools.clear()


def _imported() -> None:
    """Nothing: to find this function a worker imports this module, and with it all that labelling needs."""


def _label_groups(task: Task, model: torch.nn.Module, groups: list[tuple[Path, int]]) -> None:
    torch.set_num_threads(1)
    for file, group in groups:
        _label_group(task, model, file, group)


def _label_group(task: Task, model: torch.nn.Module, file: Path, group: int) -> None:
    spec, writer = _spec(task), None
    for batch in pq.ParquetFile(file).iter_batches(READ, row_groups=[group], columns=["id", *task.columns]):
        labels = encode(_ask_in_batches(model, _inputs(batch, task), task.teacher_batch), spec)
        table = pa.table({"example_id": batch["id"], **dict(zip(labels.schema.names, labels.columns, strict=True))})
        if writer is None:
            writer = pq.ParquetWriter(
                task.output / f"{file.stem}-{group}.parquet", table.schema, **parquet_options(table.schema)
            )
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _groups(file: Path) -> Iterator[int]:
    return iter(range(pq.read_metadata(file).num_row_groups))


def _spec(task: Task) -> SoftLabelSpec:
    return SoftLabelSpec(num_classes=task.classes)


def _inputs(batch: pa.RecordBatch | pa.Table, task: Task) -> np.ndarray:
    columns = [batch[name] for name in task.columns]
    if len(columns) > 1:
        return np.stack([np.asarray(column) for column in columns], axis=1)
    column = columns[0].combine_chunks() if isinstance(columns[0], pa.ChunkedArray) else columns[0]
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_fixed_size_list(column.type):
        values = column.flatten().to_numpy()
    else:
        start = column.offset * 4 * task.features if pa.types.is_fixed_size_binary(column.type) else 0
        values = np.frombuffer(column.buffers()[-1], np.float32, len(column) * task.features, start)
    return values.reshape(len(column), task.features)


def _ask_in_batches(model: torch.nn.Module, inputs: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([_ask(model, inputs[i : i + rows]) for i in range(0, len(inputs), rows)])


@torch.inference_mode()
def _ask(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(np.require(inputs, requirements="W"))).numpy()
