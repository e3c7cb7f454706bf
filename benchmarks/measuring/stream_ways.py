"""A topic to soft labels in several ways, each in a process of its own: a plain loop over confluent-kafka, and the streaming job.

The plain loop is what a person would write: consume, decode, ask the same teacher in the same batches, encode with the same
codec, a Parquet file a window. It has no dead letter, no offset and no restart, and nothing that it writes is flushed. Twice
side by side, each over half of the partitions, is what a person would do next where the teacher is far away.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.teacher.tfserving.serve import ModelServer

SCHEMA = "key:string,x:float32[4],sent:int64=timestamp"
PARTITIONS = 4
CLASSES = 3
BATCH = 256
FAR_INPUT = InputConfig.model_validate({"column": "x", "shape": [4]})
PLAIN, PLAIN_TWICE, OURS = "plain loop", "two plain loops", "distilbeam"


class Network(torch.nn.Module):
    """A teacher that costs something: two hidden layers, .27 million weights, which follow from a seed."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [4, width, width, CLASSES]
        self.weights = torch.nn.ParameterList(
            torch.randn(a, b, generator=generator) / a**0.5 for a, b in pairwise(sizes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer rows of features [n, 4] with logits [n, 3]."""
        first, second, third = self.weights
        return torch.relu(torch.relu(x @ first) @ second) @ third


class Far:
    """A teacher on a server, which takes a while for every request, whatever it asks.

    Args:
      delay_s: seconds that a request takes.
    """

    weights = np.random.default_rng(4).normal(size=(4, CLASSES)).astype(np.float32)

    def __init__(self, delay_s: float) -> None:
        self.delay_s, self._input = delay_s, make_input(FAR_INPUT)

    def fingerprint(self) -> str:
        return "far"

    def logits(self, batch: Any) -> Any:
        time.sleep(self.delay_s)
        return self._input(batch) @ self.weights

    def close(self) -> None:
        """There is nothing to give back."""


@contextmanager
def far_teachers(delay_s: float, count: int) -> Iterator[list[str]]:
    """Serve copies of a teacher from this process, each of which answers one request at a time; yield their addresses."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ModelServer(Far(delay_s), FAR_INPUT)) for _ in range(count)]
        yield [server.address for server in servers]


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
      way: `PLAIN`, `PLAIN_TWICE` or `OURS`.
      address: of the broker.
      topic: the topic.
      count: messages after which it ends.
      config: the configuration of a labelling job.
      window_s: length of a window in seconds.
    """

    way: str
    address: str
    topic: str
    count: int
    config: str
    window_s: float = 60.0

    @property
    def out(self) -> Path:
        """Where the labels go."""
        return Path(self.config).parent / ("labels" if self.way == OURS else "plain")


def do(task: Task) -> dict[str, float]:
    """Do it in this process; return its seconds by the clock and on the processor, imports left out."""
    from distilbeam.pipelines.streaming import job, pipeline  # noqa: F401  # both ways have imported the same

    start, used = time.perf_counter(), processor_s()
    {PLAIN: plain_loop, PLAIN_TWICE: plain_loops, OURS: streaming_job}[task.way](task)
    return {"seconds": time.perf_counter() - start, "processor_s": processor_s() - used}


def processor_s() -> float:
    """Return the seconds that this process and its children that have ended spent on the processor."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def streaming_job(task: Task) -> None:
    """Label what the topic has with a streaming job."""
    from distilbeam.pipelines.config import LabelConfig, load_any_config
    from distilbeam.pipelines.streaming.job import StreamJob
    from distilbeam.pipelines.streaming.settings import StreamSettings

    source = f"kafka:{task.address}:{task.topic}"
    settings = StreamSettings(source=source, out=str(task.out), schema=SCHEMA, until="latest", window_s=task.window_s)
    config = load_any_config(Path(task.config))
    assert isinstance(config, LabelConfig)
    state = StreamJob(config, settings).run()
    assert state.labels == task.count, f"{state.labels:,} labels of {task.count:,} messages"


def plain_loops(task: Task) -> None:
    """Do what `plain_loop` does in two threads, each over half of the partitions."""
    halves = (range(PARTITIONS // 2), range(PARTITIONS // 2, PARTITIONS))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda half: plain_loop(task, half), halves))


def plain_loop(task: Task, partitions: Sequence[int] | None = None) -> None:
    """Read, ask and write as one would by hand; a window is written when a later one has begun in every partition.

    Args:
      task: what is done.
      partitions: those that are read to their ends; None reads all, until there were as many messages as the task says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from confluent_kafka import Consumer, TopicPartition

    from distilbeam.pipelines.config import LabelConfig, load_any_config
    from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
    from distilbeam.pipelines.streaming.pipeline import spec_of
    from distilbeam.teacher.softlabels import encode

    config = load_any_config(Path(task.config))
    assert isinstance(config, LabelConfig)
    teacher = cached_teacher(teacher_text(config.teacher, ()))
    spec = spec_of(config)
    task.out.mkdir(exist_ok=True)
    options: dict[str, Any] = {"group.id": "plain", "auto.offset.reset": "earliest", "enable.auto.commit": False}
    consumer = Consumer({"bootstrap.servers": task.address, **options})
    count, name = task.count, ""
    if partitions is None:
        consumer.subscribe([task.topic])
    else:
        places = [TopicPartition(task.topic, number, 0) for number in partitions]
        count, name = sum(consumer.get_watermark_offsets(place)[1] for place in places), f"{partitions[0]}-"
        consumer.assign(places)
    windows: dict[float, list[Any]] = {}
    newest: dict[int, float] = {}
    done = 0
    while done < count:
        by_window: dict[float, list[tuple[dict[str, Any], int]]] = {}
        messages = consumer.consume(BATCH, 0.1)
        for message in messages:
            sent_ms = message.timestamp()[1]
            newest[message.partition()] = max(newest.get(message.partition(), 0.0), sent_ms / 1000)
            by_window.setdefault(sent_ms / 1000 // task.window_s, []).append((json.loads(message.value()), sent_ms))
        for window, group in by_window.items():
            x = np.array([row["x"] for row, _ in group], np.float32)
            batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 4)})
            labels = encode(np.asarray(teacher.logits(batch), np.float32), spec)
            columns = {"example_id": pa.array([row["key"] for row, _ in group]), "x": batch["x"]}
            columns |= {"sent": pa.array([sent_ms for _, sent_ms in group])}
            columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
            windows.setdefault(window, []).append(pa.table(columns))
            done += len(group)
        complete = (
            min(newest.values(), default=0.0) // task.window_s
            if len(newest) == len(partitions or range(PARTITIONS))
            else 0.0
        )
        if not messages:  # all partitions are idle
            complete = (time.time() - 2) // task.window_s
        for window in [w for w in windows if w < complete or done >= count]:
            table = pa.concat_tables(windows.pop(window))
            pq.write_table(table, task.out / f"{name}{window:.0f}-{done}.parquet", compression="zstd")
    consumer.close()
