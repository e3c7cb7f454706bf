"""Ingest: the phases in their order, in a working directory beside the pool.

The pool appears under its name when it is whole, by one rename; in an object store its files are uploaded one by one, the
summary last. Until then everything is in `.<pool>.ingest/`: a killed
ingest goes on there when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.display import Display
from distilbeam.pipelines.files import read_json, sweep, write_json
from distilbeam.pipelines.ingest.columns import ColumnType, merge_counts
from distilbeam.pipelines.ingest.duplicates import BUCKET_ROWS, Compare
from distilbeam.pipelines.ingest.index import Index, group_sources
from distilbeam.pipelines.ingest.parse import Parse, Survey, fixed_columns
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source, SourceUnit, find_sources, plan_source_units
from distilbeam.pipelines.ingest.write import PoolFile, Write, plan_pool_files
from distilbeam.pipelines.phases import run_phase
from distilbeam.pipelines.rundir import held
from distilbeam.teacher.softlabels.atomic import replacing
from distilbeam.teacher.softlabels.places import is_remote, list_files, upload

SUMMARY = "_ingest.json"
DEAD_LETTERS = "_dead_letters.jsonl"
UPLOADING = "uploading"


@dataclass(frozen=True)
class Summary:
    """What became of the sources.

    Attributes:
      files: source files.
      records: records read, bad ones included.
      rows: rows of the pool.
      duplicates: rows left out because an equal one came before.
      bad: records in the dead letters.
      first_bad: the first of them, or None.
      pool_files: files of the pool.
      bytes: their size.
      columns: the pool's columns and their types.
      digest: hash of the sources (names, sizes, times) and of the options.
    """

    files: int
    records: int
    rows: int
    duplicates: int
    bad: int
    first_bad: dict[str, Any] | None
    pool_files: int
    bytes: int
    columns: dict[str, str]
    digest: str


def ingest(
    sources: Sequence[str],
    out: Path,
    options: IngestOptions,
    *,
    beam: PipelineOptions,
    display: Display | None = None,
    attempts: int = 2,
) -> Summary:
    """Make a pool of Parquet files out of sources, or what is left of it to make.

    Args:
      sources: files, directories or glob patterns.
      out: directory of the pool, on a file system or in an object store; must not be there yet, unless the same call
        made it.
      options: how the sources are read.
      beam: Beam's options for the phases.
      display: where to show progress; nothing is shown without one.
      attempts: times that failed items are tried.

    Returns:
      What became of the sources; it is also written to `_ingest.json` in the pool.

    Raises:
      ValueError: nothing to read, sources that do not fit the options, an `out` that holds something else, or sources
        that changed since the ingest was begun.
      PhaseError: work that failed in every attempt.
    """
    display = display or Display.silent()
    found = find_sources(sources, options.format)
    digest = _digest(found, options)
    place = _working_directory(out)
    if _in_use(out, place):
        return _finished(out, digest)
    with held(place, "--out", "--out DIRECTORY") as work:
        sweep(work)
        _freeze(work, digest, found, options)
        summary = _Ingest(found, options, work, digest, beam, display, attempts).run()
        if is_remote(out):
            with display.step(f"upload to {out}"):
                _upload(work / "pool", out)
        else:
            if out.exists():
                out.rmdir()
            (work / "pool").replace(out)
        shutil.rmtree(work)
    return summary


def _working_directory(out: Path) -> Path:
    """Return where the phases work: beside the pool, or in the current directory where the pool is in an object store."""
    return (Path.cwd() if is_remote(out) else out.resolve().parent) / f".{out.name}.ingest"


def _in_use(out: Path, work: Path) -> bool:
    """Whether something is at `out`; of a pool in an object store whose upload was stopped, what is there does not count."""
    if is_remote(out):
        return (out / SUMMARY).exists() or (bool(list_files(out)) and not (work / UPLOADING).exists())
    return out.exists() and any(out.iterdir() if out.is_dir() else [out])


def _upload(pool: Path, out: Path) -> None:
    """Copy a pool to an object store, the summary last: with it the pool is whole."""
    with replacing(pool.parent / UPLOADING) as temporary:
        temporary.write_text(f"{out}\n")
    for file in sorted(pool.iterdir(), key=lambda file: (file.name == SUMMARY, file.name)):
        upload(file, out / file.name)


class _Ingest:
    def __init__(
        self,
        sources: list[Source],
        options: IngestOptions,
        work: Path,
        digest: str,
        beam: PipelineOptions,
        display: Display,
        attempts: int,
    ) -> None:
        self.sources, self.options, self.work, self.digest = sources, options, work, digest
        self.beam, self.display, self.attempts = beam, display, attempts

    def run(self) -> Summary:
        units = self._index()
        parse = self._parse(units)
        counts = [read_json(parse.files(unit)["commit"]) for unit in units]
        if not sum(count["rows"] for count in counts):
            raise ValueError(_nothing_usable(_first_bad(parse, units), self.sources))
        rows = sum(count["rows"] for count in counts)
        compare = Compare(
            tuple(str(parse.files(u)["rows"]) for u in units), -(-rows // BUCKET_ROWS), str(self.work / "losers")
        )
        self._phase("compare", "find duplicates", compare, range(compare.buckets))
        losers = compare.read()
        write = Write(compare, parse.pool_schema, str(self.work / "pool"), str(self.work / "conflicts"))
        files = self._write(write, counts, losers)
        bad_files = [*(parse.files(unit)["bad"] for unit in units), *sorted((self.work / "conflicts").glob("*.jsonl"))]
        bad, first_bad = _gather(bad_files, self.work / "pool" / DEAD_LETTERS)
        written = [path.stat().st_size for path in (self.work / "pool").glob("*.parquet")]
        summary = Summary(
            files=len(self.sources),
            records=rows + sum(count["bad"] for count in counts),
            rows=rows - len(losers),
            duplicates=int((~losers["conflict"]).sum()),
            bad=bad,
            first_bad=first_bad,
            pool_files=len(files),
            bytes=sum(written),
            columns={field.name: _type_name(parse, field) for field in parse.pool_schema},
            digest=self.digest,
        )
        write_json(self.work / "pool" / SUMMARY, asdict(summary))
        return summary

    def _index(self) -> list[SourceUnit]:
        groups = group_sources(self.sources, self.options.unit_bytes)
        index = Index(self.options, str(self.work / "index"))
        self._phase("index", "look through the sources", index, groups)
        blocks = [block for group in groups for block in index.read(group)]
        if self.options.format == "csv":
            _same_columns({block.source.name: block.columns for block in blocks})
        return plan_source_units(blocks, self.options.unit_bytes)

    def _parse(self, units: list[SourceUnit]) -> Parse:
        columns = fixed_columns(self.options) or self._survey(units)
        parse = Parse(self.options, *_pool_columns(columns, self.options), str(self.work / "rows"))
        self._phase("parse", "read the records", parse, units)
        return parse

    def _survey(self, units: list[SourceUnit]) -> dict[str, ColumnType]:
        survey = Survey(self.options, str(self.work / "survey"))
        self._phase("survey", "find the columns' types", survey, units)
        counts = merge_counts(survey.read(unit) for unit in units)
        return {name: count.decide() for name, count in counts.items()}

    def _write(self, write: Write, counts: list[dict[str, int]], losers: Any) -> list[PoolFile]:
        lost = np.bincount(losers["unit"], minlength=len(counts))
        left = [count["rows"] - int(less) for count, less in zip(counts, lost, strict=True)]
        files = plan_pool_files(left, [c["bytes"] for c in counts], self.options.file_rows, self.options.file_bytes)
        self._phase("write", "write the pool", write, files)
        return files

    def _phase(self, name: str, title: str, work: Any, items: Any) -> None:
        with self.display.step(title) as report:
            run_phase(
                name,
                work,
                list(items),
                errors=self.work / "errors" / name,
                options=self.beam,
                progress=report,
                attempts=self.attempts,
            )


def _pool_columns(
    found: dict[str, ColumnType], options: IngestOptions
) -> tuple[dict[str, ColumnType], dict[str, tuple[str, ...]]]:
    """Return the pool's columns and what its vectors are made of; the id comes first."""
    columns: dict[str, ColumnType] = {}
    members: dict[str, list[str]] = {name: [] for name in options.vectors}
    for name, type_ in found.items():
        vector = options.vector_of(name)
        if vector is None:
            columns[name] = ColumnType(options.types[name]) if name in options.types else type_
        else:
            members[vector].append(name)
            columns.setdefault(vector, type_)
    for name, vector_option in options.vectors.items():
        width = len(members[name])
        if not width:
            raise ValueError(
                f"--vector {name} must name columns of the sources, got {', '.join(vector_option.columns)}; the columns are {', '.join(found)}"
            )
        shape = vector_option.shape or (width,)
        if int(np.prod(shape)) != width:
            raise ValueError(f"--shape {name} must have as many elements as its {width:,} columns, got {list(shape)}")
        columns[name] = ColumnType("vector", vector_option.dtype, shape)
    _check_names(columns, options)
    if options.id_column is not None:
        columns = {options.id_column: columns[options.id_column], **columns}
    return columns, {name: tuple(names) for name, names in members.items()}


def _check_names(columns: dict[str, ColumnType], options: IngestOptions) -> None:
    listed = ", ".join(columns)
    if options.id_column is not None and options.id_column not in columns:
        raise ValueError(f"--id must name a column of the sources, got {options.id_column}; the columns are {listed}")
    if options.id_column is None and "id" in columns:
        raise ValueError("the sources have a column id of their own; give --id id to take it for the examples' ids")
    unknown = [name for name in options.types if name not in columns]
    if unknown:
        raise ValueError(f"--type must name a column of the sources, got {unknown[0]}; the columns are {listed}")


def _same_columns(columns: dict[str, tuple[str, ...]]) -> None:
    first = next(iter(columns), None)
    for name, found in columns.items():
        if first is not None and set(found) != set(columns[first]):
            differing = ", ".join(sorted(set(found) ^ set(columns[first])))
            raise ValueError(
                f"{name} differs from {first} in column(s) {differing}; ingest them into pools of their own"
            )


def _gather(files: Iterable[Path], target: Path) -> tuple[int, dict[str, Any] | None]:
    """Put all bad records into one file; return their number and the first."""
    count, first = 0, None
    with replacing(target) as temporary, temporary.open("w") as out:
        for line in _lines(files):
            first = first or line
            out.write(line)
            count += 1
    if not count:
        target.unlink()
    return count, None if first is None else json.loads(first)


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with file.open() as lines:
            yield from lines


def _first_bad(parse: Parse, units: list[SourceUnit]) -> dict[str, Any] | None:
    line = next(_lines(parse.files(unit)["bad"] for unit in units), None)
    return None if line is None else json.loads(line)


def _nothing_usable(first_bad: dict[str, Any] | None, sources: list[Source]) -> str:
    if first_bad is None:
        return (
            f"SOURCE must hold at least one record; its {len(sources)} file(s), the first {sources[0].path}, have none"
        )
    line = "" if first_bad["line"] is None else f" line {first_bad['line']:,}"
    return f"no record can be used, the first bad one is {first_bad['file']}{line}: {first_bad['error']}"


def _type_name(parse: Parse, field: Any) -> str:
    return parse.columns[field.name].describe() if field.name in parse.columns else "string"


def _digest(sources: list[Source], options: IngestOptions) -> str:
    files = [f"{source.path}|{source.bytes}|{source.mtime_ns}" for source in sources]
    return hashlib.blake2b("\n".join([options.model_dump_json(), *files]).encode(), digest_size=8).hexdigest()


def _finished(out: Path, digest: str) -> Summary:
    path = out / SUMMARY
    if path.exists():
        summary = Summary(**read_json(path))
        if summary.digest == digest:
            return summary
        raise ValueError(f"--out: {out} was made from other sources or with other options; name a new directory")
    raise ValueError(f"--out: {out} holds something else already; name a new directory")


def _freeze(work: Path, digest: str, sources: list[Source], options: IngestOptions) -> None:
    path = work / "plan.json"
    if not path.exists():
        files = [asdict(source) for source in sources]
        write_json(path, {"digest": digest, "options": options.model_dump(mode="json"), "sources": files})
    then = read_json(path)
    if then["digest"] == digest:
        return
    changed = {Source(**source) for source in then["sources"]} ^ set(sources)
    what = f"the sources changed ({min(source.path for source in changed)})" if changed else "the options changed"
    raise ValueError(f"{what} since this ingest was begun; put them back, or remove {work} to begin again")
