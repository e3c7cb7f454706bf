"""Text or conversations become a pool of blocks, source by source; a source that is there already is passed over.

The files of each source are packed on their own, so that a corpus grows without its former blocks being asked about
again: new sources become new files of the pool, and a changed source changes its own. What is done is in `_ingest.json`,
which is written again after each source; a call that was killed goes on with the source that it was at.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilbeam.inputs.tokenizer import TokenizerFolder, load_tokenizer
from distilbeam.pipelines.corpus.documents import BadRecord, read_documents
from distilbeam.pipelines.corpus.packing import Block, pack_text, pack_whole
from distilbeam.pipelines.corpus.settings import CorpusOptions
from distilbeam.pipelines.corpus.tokenising import require_template, tokenise
from distilbeam.pipelines.corpus.writing import BlockFiles
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.ingest.sources import Source, find_sources
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, sweep, write_json
from distilbeam.storage.paths import is_remote, list_files, remove_files
from distilbeam.storage.stores import store_of

SUMMARY, DEAD_LETTERS = "_ingest.json", "_dead_letters.jsonl"
_COUNTED = ("blocks", "tokens", "predicted", "segments", "bad")


@dataclass(frozen=True)
class CorpusSummary:
    """What became of sources.

    Attributes:
      sources: files of text that the pool is made of.
      made: of these, the ones that this call read.
      blocks: blocks of the pool.
      tokens: their tokens, without padding.
      predicted: tokens that are to be predicted.
      segments: texts and pieces of texts in the blocks.
      bad: records that are no documents, in the dead letters.
      first_bad: the first of them, or None.
      pool_files: files of the pool.
    """

    sources: int
    made: int
    blocks: int
    tokens: int
    predicted: int
    segments: int
    bad: int
    first_bad: dict[str, Any] | None
    pool_files: int


def ingest_corpus(
    sources: Sequence[str], out: Path, options: CorpusOptions, display: Display | None = None
) -> CorpusSummary:
    """Make or extend a pool of blocks.

    Args:
      sources: files, directories or glob patterns.
      out: directory of the pool, on a file system or in an object store.
      options: how the sources are read.
      display: where to show progress; nothing is shown without one.

    Returns:
      What the pool has now.

    Raises:
      ValueError: nothing to read, a tokenizer that cannot be used, an `out` that holds something else or was made with
        other options, or nothing of the sources is a block.
    """
    display = display or Display.silent()
    found = [source for source in find_sources(sources, options.format) if not _is_of_pool(source, out)]
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    if options.format == "chat":
        require_template(tokenizer)
    _ = tokenizer.end_of_text
    with store_of(out).hold(out, "--out", "--out DIRECTORY"):
        if not is_remote(out):
            sweep(out)
        return _Corpus(out, options, tokenizer).bring_up(found, display)


class _Corpus:
    def __init__(self, out: Path, options: CorpusOptions, tokenizer: TokenizerFolder) -> None:
        self.out, self.options, self.tokenizer = out, options, tokenizer
        self.made_by = {
            "fingerprint": tokenizer.fingerprint(),
            "num_classes": tokenizer.num_classes,
            "chat_template": tokenizer.chat_template_hash() if options.format == "chat" else "",
        }
        settings = options.model_dump(mode="json", exclude={"tokenizer", "max_record_bytes", "file_bytes"})
        self.digest = hashlib.blake2b(json.dumps([settings, self.made_by]).encode(), digest_size=8).hexdigest()
        self.record: dict[str, Any] = self._known()

    def bring_up(self, sources: Sequence[Source], display: Display) -> CorpusSummary:
        """Read the sources that are new or changed."""
        known = self.record["sources"]
        wanted = [s for s in sources if known.get(s.path, {}).get("state") != [s.bytes, s.mtime_ns]]
        with display.step(f"tokenise {len(wanted):,} file(s)") as progress:
            for number, source in enumerate(wanted):
                progress.step(number, len(wanted), source.name)
                self._make(source)
        return self._summary(len(wanted))

    def _make(self, source: Source) -> None:
        options, former = self.options, self.record["sources"].get(source.path, {})
        files = BlockFiles(
            self.out,
            _stem(source),
            options.sequence_length,
            json.dumps(self.made_by, sort_keys=True),
            options.file_bytes,
        )
        counts, letters = dict.fromkeys(_COUNTED, 0), []

        def good() -> Iterator[Block]:
            tokens = tokenise(read_documents(source, options), self.tokenizer, options.format)
            pack = pack_text if options.format == "lm" else pack_whole
            for block in pack(tokens, options.sequence_length, self.tokenizer.end_of_text):
                if isinstance(block, BadRecord):
                    letters.append({"file": source.name, "line": block.record, "error": block.error})
                    continue
                counts["tokens"] += block.size
                counts["predicted"] += int(block.completion_mask.sum())
                counts["segments"] += int(block.segment_ids.max())
                yield block

        files.write(good())
        self._require_unchanged(source)
        counts |= {"blocks": files.blocks, "bad": len(letters)}
        self._write_letters(source, letters)
        self.record["sources"][source.path] = {
            "name": source.name,
            "state": [source.bytes, source.mtime_ns],
            "files": files.names,
            **counts,
        }
        write_json(self.out / SUMMARY, self.record)
        remove_files([self.out / name for name in former.get("files", ()) if name not in files.names])

    def _known(self) -> dict[str, Any]:
        path = self.out / SUMMARY
        if not path.exists():
            if list_files(self.out, "*.parquet"):
                raise ValueError(f"--out: {self.out} holds something else already; name a new directory")
            return {"digest": self.digest, "options": self.options.model_dump(mode="json"), "sources": {}}
        record: dict[str, Any] = read_json(path)
        if record.get("digest") != self.digest:
            raise ValueError(
                f"--out: {self.out} was made with another tokenizer, format, length or column, or by another ingest; name a new "
                "directory"
            )
        return record

    def _write_letters(self, source: Source, letters: list[dict[str, Any]]) -> None:
        path = self.out / DEAD_LETTERS
        others = [letter for letter in _letters(path) if letter["file"] != source.name]
        if letters or path.exists():
            with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(letter, ensure_ascii=False) + "\n" for letter in [*others, *letters])

    def _require_unchanged(self, source: Source) -> None:
        state = Path(source.path).stat()
        if (state.st_size, state.st_mtime_ns) != (source.bytes, source.mtime_ns):
            raise ValueError(f"{source.path} changed while it was read; give the command again when it is whole")

    def _summary(self, made: int) -> CorpusSummary:
        all_made = self.record["sources"].values()
        totals = {name: sum(source[name] for source in all_made) for name in _COUNTED}
        first = next(_letters(self.out / DEAD_LETTERS), None)
        if not totals["blocks"]:
            why = (
                f", the first record that is none is {first['file']} {first['line']:,}: {first['error']}"
                if first
                else ""
            )
            raise ValueError(f"SOURCE must hold at least one document with tokens to predict{why}")
        files = sum(len(source["files"]) for source in all_made)
        return CorpusSummary(len(all_made), made, first_bad=first, pool_files=files, **totals)


def _is_of_pool(source: Source, out: Path) -> bool:
    """Tell whether a file is the pool's own: a pool may be made in the folder that it is made of."""
    return not is_remote(out) and Path(source.path).is_relative_to(out.resolve())


def _letters(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _stem(source: Source) -> str:
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(source.name).name).strip(".-")[:60] or "text"
    return f"{name}-{hashlib.blake2b(source.path.encode(), digest_size=6).hexdigest()}"
