"""Data sets of log-probabilities of other trainers become token labels, file by file.

A file becomes a shard, which is committed when it is whole: a call that was stopped goes on with the file that it was at, and a
later call with further files adds theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.inputs.tokenizer import TokenizerFolder, load_tokenizer
from distilbeam.pipelines.conversion.alignment import ALIGNMENTS, Alignment, Evidence
from distilbeam.pipelines.conversion.labels import LabelledRow, label_row
from distilbeam.pipelines.conversion.packing import encode_blocks, pack_rows
from distilbeam.pipelines.conversion.rows import Form, PeerRow, read_rows
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.ingest.sources import Source, find_sources
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels import SoftLabelSpec, label_key, read_manifest, write_shard
from distilbeam.teacher.softlabels.manifest import manifest_files

if TYPE_CHECKING:
    from distilbeam.pipelines.conversion.distillkit import Compression

_COUNTED = ("rows", "empty", "tokens", "labels", "unknown", "whole")


@dataclass(frozen=True)
class ConvertOptions:
    """How a data set is read, and what its labels are.

    Attributes:
      form: of the data set.
      tokenizer: folder of the teacher's tokenizer.
      sequence_length: tokens of a block.
      alignment: which token a list describes; found in the data where it is None.
      k: classes of a label; the fewest that a list has where it is None.
      teacher: name of the teacher, as the labels will say it.
      temperature: what the teacher's logits were divided by.
      compression: file of DistillKit's settings; the one beside each source where it is None.
    """

    form: Form
    tokenizer: str
    sequence_length: int
    alignment: Alignment | None = None
    k: int | None = None
    teacher: str = ""
    temperature: float = 1.0
    compression: str | None = None

    def rows(self, source: Source) -> Iterator[PeerRow]:
        """Read the rows of a file."""
        return read_rows(source, self.form, self.compression_of(source))

    def compression_of(self, source: Source) -> Compression | None:
        """Read how a file was compressed; None where nothing says."""
        if self.form != "distillkit":
            return None
        from distilbeam.pipelines.conversion.distillkit import CONFIG_FILE, read_compression

        beside = Path(source.path).with_name(CONFIG_FILE)
        if self.compression is not None:
            return read_compression(Path(self.compression))
        return read_compression(beside) if beside.exists() else None


@dataclass(frozen=True)
class Converted:
    """What became of a data set.

    Attributes:
      spec: of the labels.
      alignment: which token a list described.
      evidence: what the data said of it.
      blocks: blocks of the labels.
      counts: `rows`, of which `empty` have no label; `tokens` of the others; `labels`, of which `unknown` do not say the
        log-probability of the token that is there and `whole` leave nothing for other classes.
      made: files that this call converted.
      files: all files.
    """

    spec: SoftLabelSpec
    alignment: Alignment
    evidence: Evidence
    blocks: int
    counts: dict[str, int]
    made: int
    files: int


def convert_labels(
    sources: Sequence[str], out: Path, options: ConvertOptions, display: Display | None = None
) -> Converted:
    """Convert a data set of another trainer to token labels.

    Args:
      sources: files, directories or glob patterns; JSON lines or Parquet.
      out: the folder of the labels.
      options: how the sources are read.
      display: where to show progress; nothing is shown without one.

    Returns:
      What the labels have now.

    Raises:
      ValueError: nothing to read, a row that is no labels of this tokenizer, an alignment that is not clear, or an `out` that
        holds other labels; shards of files before the one at fault stay.
    """
    display = display or Display.silent()
    found = find_sources(sources, options.form)
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    evidence, alignment = _looked_into(found, options, display)
    spec = SoftLabelSpec(
        num_classes=tokenizer.num_classes,
        kind="top_k",
        k=options.k or evidence.fewest or 1,
        temperature=options.temperature,
        teacher=options.teacher,
        carried=BLOCK_COLUMNS,
        unit="token",
        sequence_length=options.sequence_length,
        tokenizer=tokenizer.fingerprint(),
        source=options.form,
    )
    with store_of(out).hold(out, "--out", "--out DIRECTORY"):
        return _Conversion(out, spec, alignment, options, tokenizer).bring_up(found, evidence, display)


def _looked_into(sources: Sequence[Source], options: ConvertOptions, display: Display) -> tuple[Evidence, Alignment]:
    """Read the first rows of each file for what they say of the alignment and of k."""
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"SOURCE must name files apart, two are called {twice}; name the folder that both are in")
    total, each = Evidence(), []
    with display.step(f"look into {len(sources):,} file(s)") as progress:
        for number, source in enumerate(sources):
            progress.step(number, len(sources), source.name)
            found = Evidence()
            found.add(options.rows(source))
            total.merge(found)
            each.append(found.clear())
    if total.fewest is None:
        raise ValueError(f"SOURCE must hold log-probabilities, the first rows of {sources[0].path} have none")
    if options.alignment is None and {"own", "next"} <= set(each):
        one, two = (sources[each.index(alignment)].path for alignment in ALIGNMENTS)
        raise ValueError(
            f"SOURCE must be of one alignment: lists describe their own token in {one} and the next one in {two}; convert them "
            "to folders of their own"
        )
    return total, options.alignment or total.require()


class _Conversion:
    def __init__(
        self, out: Path, spec: SoftLabelSpec, alignment: Alignment, options: ConvertOptions, tokenizer: TokenizerFolder
    ) -> None:
        self.out, self.spec, self.alignment, self.options = out, spec, alignment, options
        self.fill = tokenizer.end_of_text

    def bring_up(self, sources: Sequence[Source], evidence: Evidence, display: Display) -> Converted:
        """Convert the files that are not there yet."""
        keys = {self._key(source): source for source in sources}
        there = {entry.key: entry for entry in read_manifest(self.out).entries} if manifest_files(self.out) else {}
        if others := sorted(there.keys() - keys):
            raise ValueError(
                f"--out: {self.out} holds labels of other sources, another alignment, k or tokenizer ({there[others[0]].path}); "
                "name a new directory"
            )
        totals, blocks, made = dict.fromkeys(_COUNTED, 0), 0, [key for key in keys if key not in there]
        with display.step(f"convert {len(made):,} file(s)") as progress:
            for number, (key, source) in enumerate(keys.items()):
                progress.step(number, len(keys), source.name)
                rows, counts = (there[key].rows, there[key].extra) if key in there else self._write(key, source)
                blocks += rows
                totals = {name: total + int(counts.get(name, 0)) for name, total in totals.items()}
        if not blocks:
            raise ValueError(
                f"SOURCE must hold a token with log-probabilities and text before it, {totals['rows']:,} row(s) have none"
            )
        return Converted(self.spec, self.alignment, evidence, blocks, totals, len(made), len(keys))

    def _key(self, source: Source) -> str:
        with Path(source.path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        facts = [content, source.name, self.alignment]
        if (compression := self.options.compression_of(source)) is not None:
            facts.append(compression.model_dump_json())
        return label_key(json.dumps(facts), self.spec.teacher, self.spec)

    def _write(self, key: str, source: Source) -> tuple[int, dict[str, Any]]:
        counts: dict[str, Any] = {"source": source.name, **dict.fromkeys(_COUNTED, 0)}
        packed = pack_rows(self._labelled(source, counts), self.spec.sequence_length or 0, self.fill)
        batches = encode_blocks(packed, self.spec, source.name)
        first = next(batches, None)
        if first is None:
            return 0, counts
        # its counts are whole when the manifest entry is made, which is after the last row
        entry = write_shard(
            self.out, f"{self.options.form}-{key[:16]}", chain([first], batches), self.spec, key, counts
        )
        return entry.rows, counts

    def _labelled(self, source: Source, counts: dict[str, Any]) -> Iterator[LabelledRow]:
        length = self.spec.sequence_length or 0
        for row in self.options.rows(source):
            counts["rows"] += 1
            found = label_row(row, self.alignment, self.spec.k or 0, self.spec.num_classes)
            if found is None:
                counts["empty"] += 1
                continue
            if len(found.ids) > length:
                raise ValueError(
                    f"{row.where}: it has {len(found.ids):,} tokens, a block has {length:,}; raise --sequence-length"
                )
            there = found.classes[:, 0] >= 0
            counts["tokens"] += len(found.ids)
            counts["labels"] += int(there.sum())
            counts["unknown"] += int((found.token_logprob != found.token_logprob).sum())
            counts["whole"] += found.whole
            yield found
