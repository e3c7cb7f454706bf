"""The description of labels of tokens for people: specification, sizes, confidence, and text with the teacher's alternatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Group, RenderableType

from distilbeam.inputs.blocks import INPUT_IDS, SEGMENT_IDS
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, POSITIONS, TAIL, TOKEN_LOGPROB, flat_values
from distilbeam.teacher.softlabels.inspect import column_sizes, opened_shard, some_shards
from distilbeam.teacher.softlabels.manifest import read_manifest
from distilbeam.teacher.softlabels.plain_table import PlainTable, bytes_table, confidence_table, facts_table
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, require_unit
from distilbeam.teacher.softlabels.token_labels import TokenLabels, decode_tokens

_BATCH_BYTES = 2**26
_ALTERNATIVES = 4
_BEFORE = 12  # tokens shown before the one that is predicted
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class TokenSample:
    """One label: the text before it, the token that is there, its probability (NaN where labels do not say it), the teacher's best."""

    example_id: str
    position: int
    before: str
    token: str
    probability: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TokenInspection:
    """A summary of labels of tokens; printing it with rich shows tables.

    Attributes:
      directory: the folder of the dataset.
      spec: its specification.
      shards: number of shards.
      blocks: number of blocks.
      bytes: size of all shards.
      labels: labels in the shards that were opened, and in all by their share of blocks.
      column_bytes: compressed bytes of each column per label, of the shards that were opened.
      bits: mean of -log2 of the probability of the token that is there, where the labels say it.
      confidence: how many labels have their largest probability in each of equal parts of [0, 1].
      samples: labels chosen at random.
    """

    directory: Path
    spec: SoftLabelSpec
    shards: int
    blocks: int
    bytes: int
    labels: int
    column_bytes: dict[str, float]
    bits: float
    confidence: tuple[int, ...]
    samples: tuple[TokenSample, ...]

    def __rich__(self) -> RenderableType:
        """Show the summary."""
        return Group(self._facts(), self._columns(), self._histogram(), self._samples())

    def _facts(self) -> PlainTable:
        spec = self.spec
        facts = {
            "format version": spec.version,
            "labels": {"top_k": f"top {spec.k} with tail"}.get(spec.kind, f"{spec.k} draws (RS-KD)"),
            "blocks": f"{self.blocks:,} of {spec.sequence_length:,} tokens, which is the longest context that was labelled",
            "tokens with a label": f"{self.labels:,}",
            "positions": str(spec.positions),
            "tokenizer": f"{spec.num_classes:,} ids, {spec.tokenizer}",
            "temperature": f"{spec.temperature:g}",
            "teacher": spec.teacher or "unknown",
            "source": spec.source,
            "storage": spec.storage,
            "shards": f"{self.shards:,}",
            "size": f"{self.bytes:,} bytes, {self.bytes / max(1, self.labels):,.1f} per label",
            "the text by the teacher": f"{self.bits:.3f} bits a token",
        }
        return facts_table(f"Soft labels of tokens in {self.directory}", facts)

    def _columns(self) -> PlainTable:
        return bytes_table("label", self.column_bytes, 2)

    def _histogram(self) -> PlainTable:
        title = "The teacher's confidence" + (", by its draws" if self.spec.kind == "sampled" else "")
        return confidence_table(title, "labels", self.confidence)

    def _samples(self) -> PlainTable:
        table = PlainTable(
            "example_id", "after", "the token", "the teacher", title="Labels chosen at random", title_justify="left"
        )
        for sample in self.samples:
            shown = ", ".join(f"{token} {probability:.3f}" for token, probability in sample.alternatives)
            there = sample.token if np.isnan(sample.probability) else f"{sample.token} {sample.probability:.3f}"
            table.add_row(f"{sample.example_id} [{sample.position}]", sample.before, there, shown)
        return table


def inspect_token_labels(
    path: str | Path,
    decode: Decode | None = None,
    *,
    samples: int = 5,
    bins: int = 10,
    most_blocks: int = 20_000,
    seed: int = 0,
) -> TokenInspection:
    """Summarise a dataset of labels of tokens.

    Args:
      path: the folder of the dataset.
      decode: makes text of ids; ids are shown without it.
      samples: labels to show.
      bins: parts of the histogram of the teacher's confidence.
      most_blocks: whole shards are opened in random order until they have this many blocks.
      seed: seed of the random choices.

    Returns:
      The summary.

    Raises:
      ValueError: there is no dataset, its labels are of examples, or a shard cannot be read.
    """
    manifest = read_manifest(path)
    require_unit(manifest.spec, "token", path)
    rng = np.random.default_rng(seed)
    opened = some_shards(manifest, most_blocks, rng)
    confidence, sizes = np.zeros(bins, np.int64), Counter[str]()
    blocks = sum(manifest.entries[i].rows for i in opened)
    wanted = np.sort(rng.choice(blocks, min(samples, blocks), replace=False))
    labels, known, bits, first = 0, 0, 0.0, 0
    shown: list[TokenSample] = []
    for i in opened:
        sizes.update(column_sizes(manifest.paths()[i]))
        for batch in _batches(manifest.paths()[i], manifest.spec):
            found = decode_tokens(batch, manifest.entries[i].spec)
            there = found.labelled
            best = np.exp(np.where(found.classes >= 0, found.logprobs, -np.inf).max(axis=2)[there])
            confidence += np.bincount(np.minimum((best * bins).astype(int), bins - 1), minlength=bins)
            said = found.token_logprob[there]
            labels, known = labels + len(said), known + int(np.isfinite(said).sum())
            bits -= float(said[np.isfinite(said)].sum()) / np.log(2)
            here = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            shown += [
                _sample(batch, found, row, rng, decode or _ids) for row in here.tolist() if found.labelled[row].any()
            ]
            first += len(batch)
    return TokenInspection(
        manifest.directory,
        manifest.spec,
        len(manifest.entries),
        manifest.rows,
        manifest.bytes,
        round(labels * manifest.rows / blocks),
        {name: size / max(1, labels) for name, size in sizes.items()},
        bits / max(1, known),
        tuple(confidence.tolist()),
        tuple(shown),
    )


def _batches(path: Path, spec: SoftLabelSpec) -> Iterator[pa.RecordBatch]:
    names = ["example_id", INPUT_IDS, SEGMENT_IDS, LOGPROBS, CLASSES, TAIL, TOKEN_LOGPROB, POSITIONS]
    with opened_shard(path) as file:
        there = [name for name in names if name in file.schema_arrow.names]
        yield from file.iter_batches(max(1, _BATCH_BYTES // spec.label_bytes), columns=there)


def _sample(
    batch: pa.RecordBatch, labels: TokenLabels, row: int, rng: np.random.Generator, decode: Decode
) -> TokenSample:
    slot = int(rng.choice(np.flatnonzero(labels.labelled[row])))
    place = slot if labels.positions is None else int(labels.positions[row, slot])
    length = batch.column(INPUT_IDS).type.list_size
    ids, segments = (flat_values(batch.column(name), length)[row] for name in (INPUT_IDS, SEGMENT_IDS))
    begin = max(place + 1 - _BEFORE, int(np.argmax(segments == segments[place])))
    order = np.argsort(-labels.logprobs[row, slot], kind="stable")[:_ALTERNATIVES]
    classes, logprobs = labels.classes[row, slot], labels.logprobs[row, slot]
    alternatives = [(decode([int(classes[i])]), float(np.exp(logprobs[i]))) for i in order if classes[i] >= 0]
    return TokenSample(
        str(batch.column("example_id")[row].as_py()),
        place,
        decode(ids[begin : place + 1].tolist()),
        decode([int(ids[place + 1])]),
        float(np.exp(labels.token_logprob[row, slot])),
        tuple(alternatives),
    )


def _ids(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
