"""A streaming job from its start to its end: checks, the lease, where to begin, the pipeline, and again where it dies.

The driver looks at what is committed, as for every other job: it submits the pipeline for what is not settled, follows the
commits, and submits again when the engine has died, as long as that makes progress. At the end the offsets that were read and
those that are settled must be the same.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import CrossLanguageOptions, StandardOptions
from apache_beam.utils.subprocess_server import JavaJarServer

from distilbeam.pipelines.config import LabelConfig
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.engine_lines import engine_lines, first_line
from distilbeam.pipelines.engine.prism import Runner, choose_runner, running
from distilbeam.pipelines.pool.reserved_names import require_free_for_labelling
from distilbeam.pipelines.streaming.checks import (
    decoder_of,
    require_expansion_service,
    require_installed,
    require_same_dataset,
)
from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.journal import FOLDER, Journal, skip
from distilbeam.pipelines.streaming.kafka_client import Topic, ends_of, offsets_at, parse_place
from distilbeam.pipelines.streaming.kafka_ends import Lag
from distilbeam.pipelines.streaming.kafka_reader import Reading, close_readers
from distilbeam.pipelines.streaming.letters import Letters
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.streaming.pipeline import build, has_budget, spec_of
from distilbeam.pipelines.streaming.pubsub_reader import PubsubReading, close_pubsub_readers, require_subscription
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.pipelines.streaming.state import StreamState
from distilbeam.pipelines.streaming.stop_file import ask_to_stop, clear_stop
from distilbeam.pipelines.streaming.write_panes import fence
from distilbeam.storage.paths import is_remote, to_path
from distilbeam.storage.stores import store_of

ATTEMPTS = 3  # times the pipeline may die without having committed anything in between
_TICK_S = 0.5
_LAG_S = 2.0
_PAUSE_S = 1.0  # before the pipeline is submitted again
log = logging.getLogger("distilbeam.stream")


@dataclass
class StreamJob:
    """A streaming job.

    Args:
      config: the configuration of a labelling job, with absolute paths.
      settings: the job's options.
      flags: Beam's options.
      report: called every now and then with the state.
      say: called with a sentence that is to be seen.

    Raises:
      ValueError: what is wrong before the first message is read; see `checks`.
    """

    config: LabelConfig
    settings: StreamSettings
    flags: Sequence[str] = ()
    report: Callable[[StreamState], None] = lambda state: None  # noqa: ARG005
    say: Callable[[str], None] = log.warning
    state: StreamState = field(default_factory=StreamState)

    def __post_init__(self) -> None:
        settings, data = self.settings, self.config.data
        if self.config.labels_tokens:
            raise ValueError(
                f"teacher.kind must be that of a classifier for a stream, got {self.config.teacher.kind!r}, which labels blocks of "
                "tokens; 'distilbeam label' labels a pool of them"
            )
        self.runner: Runner = choose_runner(self.flags, unbounded=settings.unbounded)
        require_installed(settings, self.config, self.runner)
        beams = pipeline_options(self.runner.flags)
        if settings.kind == "kafka-java":
            parse_place(settings.place, settings.consumer)
            require_expansion_service(beams)
        require_free_for_labelling(data.carry, self.config.teacher.input.columns, data.id, "data.carry")
        if has_budget(self.config) and (settings.shards > 1 or settings.max_rows) and settings.messages:
            raise ValueError(
                "--shards and --max-rows must be left out with a budget: a window's choice is written and settled as one"
            )
        self.decoder: Decoder | None = None
        self.topic: Topic | None = None
        self._reading: Reading | PubsubReading | None = None
        self._lag: Lag | None = None
        self._letters: Letters | None = None
        self._ends: dict[int, tuple[int, int]] = {}
        self._failed = ""
        self._stopping = threading.Event()
        if settings.messages:
            self.decoder = decoder_of(settings, self.config)
        if settings.kind == "kafka":
            self.topic = parse_place(settings.place, settings.consumer)
            self._ends = ends_of(self.topic)
        if settings.kind == "pubsub" and not self.runner.reads_pubsub:
            require_subscription(settings.place)
        self.spec = spec_of(self.config)
        require_same_dataset(settings.out, self.spec)

    @property
    def engine_log(self) -> Path | None:
        """File of the engine's and Beam's own lines; None in an object store."""
        root = to_path(self.settings.out)
        return None if is_remote(root) else root / FOLDER / "engine.log"

    def plan(self) -> str:
        """Say what is there without a label; every check has been made, nothing is read of the source and nobody is asked."""
        where = f"{self.settings.source}, for the labels in {self.settings.out}"
        if self.topic is None:
            return f"The job can start: {where}. How many messages there are is not known before they are read."
        journal = Journal(self.settings.out, self.topic.name)
        journal.look()
        spans = [span for p, (low, end) in self._ends.items() for span in journal.settled.offsets.missing(p, low, end)]
        count = sum(last - first + 1 for first, last in spans)
        return (
            f"The job can start: {where}. {count:,} message(s) that the topic has now, in {len(self._ends):,} partition(s), have "
            "neither a label nor a dead letter."
        )

    def run(self) -> StreamState:
        """Do the job until its end, which is `--until`'s, or that `stop` was called or asked for.

        Raises:
          ValueError: another process works on the dataset.
          RuntimeError: the engine dies again and again, too many messages have no label, or messages were lost.
        """
        out = self.settings.out
        with store_of(out).hold(to_path(out), "--out", "--out"), engine_lines(self.engine_log):
            clear_stop(out)
            if self._stopping.is_set():  # told while everything was loading
                ask_to_stop(out)
            if self.settings.kind == "letters":
                self._letters = Letters(self.settings.place, out)
            journal = Journal(out, self._name)
            journal.look()
            if self.topic is not None:
                self._begin(self.topic, journal)
                self._lag = Lag(self.topic, _LAG_S)
            if self.settings.kind == "pubsub" and not self.runner.reads_pubsub:
                self._reading = self._subscription()
            try:
                self._until_done(journal)
            finally:
                close_readers()
                close_pubsub_readers()
                if self._lag is not None:
                    self._lag.close()
            self._require_all_settled(journal)
            if self._letters is not None:
                self._letters.forget()
        if self._failed:
            raise RuntimeError(self._failed)
        return self.state

    def stop(self) -> None:
        """Read no further, and commit what was asked."""
        self._stopping.set()
        ask_to_stop(self.settings.out)

    @property
    def _name(self) -> str:
        if self._letters is not None:
            return self._letters.topic
        if not self.settings.messages:  # the rows of files have no offsets, and their entries name no topic
            return ""
        if self.settings.kind == "kafka-java":
            return parse_place(self.settings.place, ()).name
        return self.settings.place if self.topic is None else self.topic.name

    def _begin(self, topic: Topic, journal: Journal) -> None:
        """Find out where reading begins and, where it has an end, where it ends."""
        settings, settled = self.settings, journal.settled
        if settings.start == "latest":
            passed = Offsets()
            for partition, (_, end) in self._ends.items():
                for first, last in settled.offsets.missing(partition, 0, end):
                    passed.add(partition, first, last)
            if passed.count:
                skip(settings.out, topic.name, passed)
            journal.hurry()
            journal.look()
        known = settled.offsets
        if settings.start == "earliest":  # what was passed over once is read now
            known = Offsets()
            for partition, first, last in settled.offsets:
                for a, b in settled.skipped.missing(partition, first, last + 1):
                    known.add(partition, a, b)
        until = None
        if settings.until:
            time_ms = settings.until_ms()
            until = {p: end for p, (_, end) in self._ends.items()}
            if time_ms is not None:
                until = None if time_ms > time.time() * 1000 else offsets_at(topic, time_ms, self._ends)
        start = {p: known.first_missing(p, 0) for p in self._ends}
        for partition, (low, _) in self._ends.items():
            if start[partition] and low > start[partition]:
                self.say(
                    f"partition {partition} of {topic.name} has lost {low - start[partition]:,} message(s) before they were "
                    f"labelled: it begins at {low:,} now and the labels end before {start[partition]:,}; keep messages for longer"
                )
            start[partition] = max(low, start[partition])
        wait = 0.0 if has_budget(self.config) else settings.allowed_lateness_s
        self._reading = Reading(
            topic,
            tuple(sorted(start.items())),
            tuple((p, first, last) for p, first, last in known if last >= start.get(p, 0)),
            None if until is None else tuple(sorted(until.items())),
            settings.window_s,
            wait,
            settings.idle_s,
            self.config.engine.teacher_batch,
            settings.max_wait_s,
            settings.out,
            self.decoder if settings.event_time else None,
            settled.closed_s,
        )

    def _subscription(self) -> PubsubReading:
        settings = self.settings
        return PubsubReading(
            settings.place,
            settings.out,
            settings.window_s,
            settings.allowed_lateness_s,
            has_budget(self.config),
            settings.idle_s,
            self.config.engine.teacher_batch,
            settings.max_wait_s,
            self.decoder if settings.event_time else None,
        )

    def _until_done(self, journal: Journal) -> None:
        """Submit the pipeline, and again for what is left where it dies."""
        left = ATTEMPTS
        while True:
            before = journal.settled.count
            attempt = uuid.uuid4().hex
            error = self._submit(journal, attempt)
            fence(attempt)
            journal.hurry()
            if self._lag is not None:
                self._lag.hurry()
            self._look(journal)
            if error is None:
                return
            progress = journal.settled.count > before
            left = ATTEMPTS if progress else left - 1
            where = f"; the engine's lines are in {self.engine_log}" if self.engine_log is not None else ""
            if left <= 0 or self._reading is None or self._stopping.is_set():
                raise RuntimeError(
                    f"the pipeline ended before its work was done: {error}. {self.state.labels:,} labels are committed, the same "
                    f"command goes on from there{where}"
                )
            self.say(
                f"the pipeline ended before its work was done ({error}); it is submitted again for what is left{where}"
            )
            self.state.restarts += 1
            close_readers()
            close_pubsub_readers()
            time.sleep(_PAUSE_S)
            if isinstance(self._reading, Reading):
                self._reading = self._resumed(self._reading, journal)

    def _resumed(self, reading: Reading, journal: Journal) -> Reading:
        known = journal.settled.offsets
        start = tuple((p, known.first_missing(p, offset)) for p, offset in reading.start)
        firsts = dict(start)
        settled = tuple(item for item in known if item[2] >= firsts.get(item[0], 0))
        return replace(reading, start=start, settled=settled, closed_s=journal.settled.closed_s)

    def _submit(self, journal: Journal, attempt: str) -> str | None:
        """Run the pipeline once; return why it ended before its work was done."""
        with ExitStack() as stack:
            flags = list(self.runner.flags)
            if self.runner.prism is not None:
                address = stack.enter_context(running(self.runner.prism, self.engine_log or Path("engine.log")))
                flags.append(f"--job_endpoint={address}")
            options = pipeline_options(flags)
            reading = self._reading
            options.view_as(StandardOptions).streaming = (
                reading.until is None if isinstance(reading, Reading) else self.settings.unbounded
            )
            work = _Running(lambda: self._run(options, attempt))
            stack.callback(work.cancel)
            while not work.done.wait(_TICK_S):
                self._look(journal)
            return work.error

    def _run(self, options: Any, attempt: str) -> Any:
        pipeline = beam.Pipeline(options=options)
        services = options.view_as(CrossLanguageOptions).beam_services
        with JavaJarServer.beam_services(services):  # as a pipeline's own block does, which would wait for its end, too
            done = build(pipeline, self.config, self.settings, self.decoder, self._reading, attempt, self._letters)
        if self.runner.prism is not None:  # while a stage without an output writes, it asks without a pause
            _ = done | "End" >> beam.Reshuffle() | "Nothing" >> beam.Filter(lambda _: False)
        return pipeline.run()

    def _look(self, journal: Journal) -> None:
        """See what has been committed; end the job where it must."""
        for facts in journal.look():
            self.state.add(facts)
        allowed = self.settings.failures_allowed(self.state.settled)
        if allowed is not None and self.state.dead_letters > allowed and not self._failed:
            self._failed = (
                f"{self.state.dead_letters:,} of {self.state.settled:,} messages have no label, more than --max-failures "
                f"{self.settings.max_failures}; why, is in {self.settings.letters}. The same command goes on behind them"
            )
            self.stop()
        time_ms = self.settings.until_ms()
        if time_ms is not None and time.time() * 1000 >= time_ms and not self._stopping.is_set():
            self.stop()
        if self._lag is not None:
            self._lag.look(journal.settled.offsets)
            self.state.lag = self._lag.by_partition
        self.report(self.state)

    def _require_all_settled(self, journal: Journal) -> None:
        """Compare what was read with what is settled: a message between two that are was asked about and lost."""
        if self._failed or not isinstance(self._reading, Reading):  # what Pub/Sub has delivered it delivers again
            return
        if holes := unsettled(self._reading, journal.settled.offsets):
            count = sum(last - first + 1 for _, first, last in holes)
            partition, first, _ = holes[0]
            raise RuntimeError(
                f"{count:,} message(s) were read and neither labelled nor refused, the first at offset {first:,} of partition "
                f"{partition}: the runner has lost them; start again, which asks about them"
            )


def unsettled(reading: Reading, settled: Offsets) -> list[tuple[int, int, int]]:
    """List the intervals (partition, first, last) that a reading has passed and that are not settled.

    Args:
      reading: what was read: from its start to its end or, without one, to the last offset that is settled.
      settled: what is committed.
    """
    ends = {partition: last + 1 for partition, _, last in settled}
    if reading.until is not None:
        ends = {partition: min(end, ends.get(partition, 0)) for partition, end in reading.until}
    return [
        (partition, first, last)
        for partition, start in reading.start
        for first, last in settled.missing(partition, start, ends.get(partition, 0))
    ]


class _Running:
    """A pipeline that runs in a thread, so that signals and commits are seen meanwhile."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.done = threading.Event()
        self.error: str | None = None
        self._result: Any = None
        threading.Thread(target=self._run, args=(run,), daemon=True).start()

    def _run(self, run: Callable[[], Any]) -> None:
        try:
            self._result = run()
            self._result.wait_until_finish()
        except Exception as e:  # of any runner; the caller decides what it means
            self.error = first_line(e)
            log.debug("the pipeline ended", exc_info=True)
        finally:
            self.done.set()

    def cancel(self) -> None:
        """End a pipeline that has not ended."""
        if self._result is not None and not self.done.is_set():
            try:
                self._result.cancel()
            except Exception as e:  # noqa: BLE001  # of any runner; one that is gone cannot be told, and the job ends anyway
                log.warning("the engine could not be told to end: %s", first_line(e))
