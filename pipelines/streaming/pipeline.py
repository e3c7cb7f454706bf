"""The graph of the streaming job: read, decode, label, write, by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.transforms.trigger import AccumulationMode, AfterCount, AfterWatermark
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Duration

from distilbeam.pipelines.config import LabelConfig
from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.streaming.beam_sources import StampMessages, gathered, read_messages, runners_lateness_s
from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.kafka_read import ReadKafka
from distilbeam.pipelines.streaming.kafka_reader import Reading
from distilbeam.pipelines.streaming.label_messages import DecodeMessages, LabelChosen, LabelMessages
from distilbeam.pipelines.streaming.letters import Letters, read_letters
from distilbeam.pipelines.streaming.pubsub_read import ReadPubsub
from distilbeam.pipelines.streaming.pubsub_reader import PubsubReading
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.pipelines.streaming.write_panes import WritePanes
from distilbeam.pipelines.transforms.label_examples import LabelExamples
from distilbeam.pipelines.transforms.select_examples import SelectExamples
from distilbeam.pipelines.transforms.write_soft_labels import WriteSoftLabels
from distilbeam.student.trust import trusted
from distilbeam.teacher.softlabels import SoftLabelSpec


class LabelStream(beam.PTransform):
    """Windowed record batches to the manifest entries of soft labels: choose where there is a budget, label, write.

    Args:
      config: the configuration of a labelling job.
      base: directory that the configuration's relative paths are relative to.
      out: the soft-label dataset.
      shards: shards of a window.
      dead_letters: directory for rows that the teacher cannot answer.
    """

    def __init__(
        self, config: LabelConfig, base: Path, out: str, *, shards: int = 1, dead_letters: str | None = None
    ) -> None:
        super().__init__()
        self.config = config.relative_to(base)
        self.out, self.shards, self.dead_letters = out, shards, dead_letters

    def expand(self, batches: Any) -> Any:
        spec = spec_of(self.config)
        if has_budget(self.config):
            batches = batches | _select(self.config)
        label = LabelExamples(
            self.config.teacher,
            spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
            dead_letters=self.dead_letters,
        )
        return batches | label | WriteSoftLabels(self.out, spec, shards=self.shards)


class LabelMessageStream(beam.PTransform):
    """Windowed batches of messages, or what became of them already, to what was committed of them.

    Args:
      config: the configuration of a labelling job, with absolute paths.
      settings: the job's options.
      decoder: how messages become rows.
      topic: what the messages come from.
      attempt: name of this submission of the pipeline.
      again: mark of the dead letters that the messages were, or "".
      asked: whether the source has asked the teacher, and gives outcomes.
    """

    def __init__(
        self,
        config: LabelConfig,
        settings: StreamSettings,
        decoder: Decoder,
        topic: str,
        attempt: str = "",
        again: str = "",
        *,
        asked: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.settings, self.decoder, self.topic = config, settings, decoder, topic
        self.attempt, self.again, self.asked = attempt, again, asked

    def expand(self, batches: Any) -> Any:
        spec = spec_of(self.config)
        labelling = _labelling(self.config, spec)
        if self.asked:
            outcomes = batches
        elif has_budget(self.config):
            decode = DecodeMessages(self.decoder, self.topic)
            decoded = batches | "Decode" >> beam.ParDo(decode).with_outputs("receipts", main="rows")
            labelled = (
                decoded.rows | _select(self.config) | "LabelChosen" >> beam.ParDo(LabelChosen(labelling, self.topic))
            )
            outcomes = (labelled, decoded.receipts) | "LabelsAndReceipts" >> beam.Flatten()
        else:
            outcomes = batches | "Label" >> beam.ParDo(LabelMessages(self.decoder, labelling, self.topic))
        out, letters, shards = self.settings.out, self.settings.letters, self.settings.shards
        return outcomes | WritePanes(
            out, letters, spec, self.topic, shards=shards, attempt=self.attempt, again=self.again
        )


def _labelling(config: LabelConfig, spec: SoftLabelSpec) -> Labelling:
    return Labelling(
        teacher=teacher_text(config.teacher, spec.classes),
        spec=spec,
        id_column=config.data.id,
        teacher_batch=config.engine.teacher_batch,
        trust=trusted(),
    )


def _pattern(place: str) -> str:
    """Say which files are meant; by a folder, the Parquet files in it."""
    folder = place.endswith("/") or Path(place).is_dir()
    return f"{place.rstrip('/')}/*.parquet" if folder else place


def build(
    pipeline: Any,
    config: LabelConfig,
    settings: StreamSettings,
    decoder: Decoder | None,
    reading: Reading | PubsubReading | None,
    attempt: str = "",
    letters: Letters | None = None,
) -> Any:
    """Add the job's steps to a pipeline; return what was committed.

    Args:
      pipeline: the pipeline.
      config: the configuration of a labelling job, with absolute paths.
      settings: the job's options.
      decoder: how messages become rows; None for files.
      reading: how the Kafka topic or the Pub/Sub subscription is read; None for other sources and Beam's own connectors.
      attempt: name of this submission of the pipeline.
      letters: the dead letters that are asked again; None for other sources.
    """
    if not settings.messages:
        tables = pipeline | "ReadParquet" >> beam.io.ReadFromParquetBatched(_pattern(settings.place))
        batches = tables | "Batches" >> beam.FlatMap(lambda table: table.to_batches())
        return batches | LabelStream(
            config, Path(), settings.out, shards=settings.shards, dead_letters=settings.letters
        )
    assert decoder is not None
    clock = decoder if settings.event_time else None
    again, asked = "", False
    if letters is not None:
        items = list(letters.batches(settings.window_s, config.engine.teacher_batch, clock))
        batches = read_letters(pipeline, items) | "Window" >> beam.WindowInto(FixedWindows(settings.window_s))
        topic, again = letters.topic, letters.mark
    elif reading is not None:
        # the source gathers the batches, by window, so that they are full whatever the runner's bundles are, and asks
        topic, asked, then = reading.name, not has_budget(config), None
        if asked:
            then = LabelMessages(decoder, _labelling(config, spec_of(config)), topic)
        if isinstance(reading, PubsubReading):
            read, lateness_s = ReadPubsub(reading, then), runners_lateness_s(settings)
        else:
            read, lateness_s = ReadKafka(reading, then), settings.allowed_lateness_s
        batches = pipeline | "ReadMessages" >> read | "Window" >> _windows(settings, config, lateness_s)
    else:
        messages, topic = read_messages(pipeline, settings)
        gather = beam.BatchElements(
            min_batch_size=1,
            max_batch_size=config.engine.teacher_batch,
            max_batch_duration_secs=settings.max_wait_s or None,
        )
        stamp = StampMessages(settings.window_s, settings.allowed_lateness_s, clock)
        windows = _windows(settings, config, runners_lateness_s(settings))
        stamped = messages | "AtTheirTime" >> beam.ParDo(stamp) | "Window" >> windows
        batches = stamped | "Batch" >> gather | "Gathered" >> beam.FlatMap(gathered)
    return batches | LabelMessageStream(config, settings, decoder, topic, attempt, again, asked=asked)


def spec_of(config: LabelConfig) -> SoftLabelSpec:
    """Return the specification of a configuration's labels; loads the teacher."""
    data, labels = config.data, config.labels
    return SoftLabelSpec(
        num_classes=data.num_classes or len(data.classes),
        kind=labels.kind,
        k=labels.k,
        temperature=labels.temperature,
        storage=labels.storage,
        classes=data.classes or None,
        teacher=cached_teacher(teacher_text(config.teacher, data.classes)).fingerprint(),
        carried=data.carry,
    )


def has_budget(config: LabelConfig) -> bool:
    """Tell whether a budget is chosen from each window."""
    return config.watch.budget is not None


def _select(config: LabelConfig) -> SelectExamples:
    watch = config.watch
    assert watch.budget is not None
    assert watch.student is not None
    assert watch.wrong_share is not None
    return SelectExamples(watch.student, watch.budget, wrong_share=watch.wrong_share, gain=watch.gain, seed=watch.seed)


def _windows(settings: StreamSettings, config: LabelConfig, lateness_s: float) -> Any:
    windows = FixedWindows(settings.window_s)
    if has_budget(config):  # its examples are chosen once, so that nothing can come after
        return beam.WindowInto(windows)
    if not settings.max_rows:
        return beam.WindowInto(windows, allowed_lateness=Duration(lateness_s))
    batches = max(1, settings.max_rows // config.engine.teacher_batch)
    return beam.WindowInto(
        windows,
        trigger=AfterWatermark(early=AfterCount(batches), late=AfterCount(1)),
        accumulation_mode=AccumulationMode.DISCARDING,
        allowed_lateness=Duration(lateness_s),
    )
