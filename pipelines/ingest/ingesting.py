"""Ingest: the steps in their order, in a working directory beside the pool.

CSV, JSON lines and text are read by DuckDB in this process; TFRecord files and images by phases of a Beam pipeline, whose
finished parts a second start finds again. From there all go one way: find duplicates, write the pool. The pool appears under
its name when it is whole, by one rename; in an object store its files are uploaded one by one, the summary last. Until then
everything is in `.<pool>.ingest/`, and a killed ingest is done again when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.ingest.columns import ColumnType
from distilbeam.pipelines.ingest.csv_table import load_csv
from distilbeam.pipelines.ingest.database import opened
from distilbeam.pipelines.ingest.duplicates import find_duplicates
from distilbeam.pipelines.ingest.letters import Letters
from distilbeam.pipelines.ingest.lines_table import load_json, load_text
from distilbeam.pipelines.ingest.pool_columns import pool_columns
from distilbeam.pipelines.ingest.records import Bad
from distilbeam.pipelines.ingest.records_table import RecordsTable
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source, find_sources
from distilbeam.pipelines.ingest.text_types import CsvTypes, JsonTypes, TextTypes, count_kinds
from distilbeam.pipelines.ingest.typed_text import TypedText
from distilbeam.pipelines.ingest.write import without, write_pool
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, sweep, write_json
from distilbeam.storage.paths import is_remote, list_files, upload
from distilbeam.storage.stores import store_of

if TYPE_CHECKING:
    from distilbeam.pipelines.ingest.parsed_records import ParsedRecords

SUMMARY = "_ingest.json"
DEAD_LETTERS = "_dead_letters.jsonl"
UPLOADING = "uploading"
_AT_ONCE = 10_000  # conflicts whose lines are looked up at once


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
    beam: Any = None,
    display: Display | None = None,
    attempts: int = 2,
) -> Summary:
    """Make a pool of Parquet files out of sources.

    Args:
      sources: files, directories or glob patterns.
      out: directory of the pool, on a file system or in an object store; must not be there yet, unless the same call
        made it.
      options: how the sources are read.
      beam: Beam's options for reading TFRecord files and images.
      display: where to show progress; nothing is shown without one.
      attempts: times that failed parts of TFRecord files and images are tried.

    Returns:
      What became of the sources; it is also written to `_ingest.json` in the pool.

    Raises:
      ValueError: nothing to read, sources that do not fit the options or change meanwhile, an `out` that holds
        something else.
      PhaseError: work that failed in every attempt.
    """
    display = display or Display.silent()
    found = find_sources(sources, options.format)
    digest = _digest(found, options)
    work = _working_directory(out)
    if _in_use(out, work):
        summary = _finished(out, digest)
        display.say(f"{out} was made from these sources with these options before; nothing is left to do.")
        return summary
    with store_of(work).hold(work, "--out", "--out DIRECTORY"):
        sweep(work)
        summary = _begun(work, digest) or _Ingest(found, options, work, digest, beam, display, attempts).run()
        if is_remote(out):
            with display.step(f"upload to {out}"):
                _upload(work / "pool", out)
        else:
            if out.exists():
                out.rmdir()
            (work / "pool").replace(out)
        shutil.rmtree(work)
    return summary


class _Ingest:
    def __init__(
        self,
        sources: list[Source],
        options: IngestOptions,
        work: Path,
        digest: str,
        beam: Any,
        display: Display,
        attempts: int,
    ) -> None:
        self.sources, self.options, self.work, self.digest = sources, options, work, digest
        self.beam, self.display, self.attempts = beam, display, attempts
        self.letters = Letters(work / "letters", sources)

    def run(self) -> Summary:
        """Make the pool in the working directory."""
        paths = [source.path for source in self.sources]
        with closing(self.letters), opened(self.work, paths) as connection:
            if self.options.format in ("tfrecord", "images"):
                return self._ingest_parsed(connection)
            return self._ingest_text(connection)

    def _ingest_parsed(self, connection: duckdb.DuckDBPyConnection) -> Summary:
        from distilbeam.pipelines.ingest.parsed_records import parse_records  # for text nobody waits for its imports

        parsed = parse_records(
            self.sources, self.options, self.work, beam=self.beam, display=self.display, attempts=self.attempts
        )
        for bad in parsed.bad():
            self.letters.add(bad)
        self._check_any(connection, parsed.rows)
        parsed.load_keys(connection)
        return self._finish(connection, parsed, parsed.rows + parsed.unusable)

    def _ingest_text(self, connection: duckdb.DuckDBPyConnection) -> Summary:
        with self._step("read the records"):
            table, types = self._load(connection)
        self._check_any(connection, table.rows)
        records = table.rows + self.letters.count
        with self._step("find the columns' types"):
            typed, unfit = self._typed(table, types)
        self._check_any(connection, table.rows - unfit)
        return self._finish(connection, typed, records)

    def _load(self, connection: duckdb.DuckDBPyConnection) -> tuple[RecordsTable, TextTypes]:
        add = self.letters.add
        match self.options.format:
            case "csv":
                return load_csv(connection, self.sources, self.options, self.work / "copies", add), CsvTypes()
            case "jsonl":
                return load_json(connection, self.sources, self.options, add), JsonTypes()
            case _:
                return load_text(connection, self.sources, self.options, add), CsvTypes()

    def _typed(self, table: RecordsTable, types: TextTypes) -> tuple[TypedText, int]:
        found: dict[str, ColumnType] = {}
        unsure = set(self.options.types)
        for name in table.names:
            found[name] = ColumnType("string")
            if self.options.format != "text" and name not in unsure and self.options.vector_of(name) is None:
                counts = count_kinds(table, types, name)
                found[name] = counts.decide()
                unsure |= set() if counts.all_fit(found[name]) else {name}
        typed = TypedText(table, pool_columns(found, self.options), types, frozenset(unsure))
        unfit = typed.find_bad()
        for bad in typed.bad():
            self.letters.add(bad)
        return typed, unfit

    def _finish(
        self, connection: duckdb.DuckDBPyConnection, loaded: TypedText | ParsedRecords, records: int
    ) -> Summary:
        """Leave out bad records and duplicates of `records` and write the pool."""
        pool = self.work / "pool"
        with self._step("find duplicates"):
            repeated = find_duplicates(connection, loaded.key, loaded.content, loaded.columns)
        for start in range(0, len(repeated.conflicting), _AT_ONCE):
            for file, line in loaded.places(repeated.conflicting[start : start + _AT_ONCE].tolist()):
                self.letters.add(Bad(file, line, "the id of this record is that of an earlier one with other content"))
        with self._step("write the pool"):
            misfits = connection.execute("SELECT number FROM bad ORDER BY number").fetchnumpy()["number"]
            dropped = np.sort(np.concatenate([np.asarray(misfits, np.int64), repeated.equal, repeated.conflicting]))
            shutil.rmtree(pool, ignore_errors=True)
            files = write_pool(without(loaded.tables(), dropped), loaded.pool.schema, pool, self.options)
            first = self.letters.write(connection, pool / DEAD_LETTERS)
        self._check_unchanged()
        summary = Summary(
            files=len(self.sources),
            records=records,
            rows=records - self.letters.count - len(repeated.equal),
            duplicates=len(repeated.equal),
            bad=self.letters.count,
            first_bad=first,
            pool_files=len(files),
            bytes=sum(path.stat().st_size for path in files),
            columns=loaded.pool.describe(),
            digest=self.digest,
        )
        with replacing(pool / SUMMARY) as temporary:  # its columns are in their order, not in that of their names
            temporary.write_text(json.dumps(asdict(summary), indent=2) + "\n")
        return summary

    @contextmanager
    def _step(self, title: str) -> Iterator[None]:
        with self.display.step(title):
            yield

    def _check_any(self, connection: duckdb.DuckDBPyConnection, rows: int) -> None:
        if rows:
            return
        bad = self.letters.write(connection, self.work / DEAD_LETTERS)
        if bad is None:
            raise ValueError(
                f"SOURCE must hold at least one record; its {len(self.sources)} file(s), the first "
                f"{self.sources[0].path}, have none"
            )
        line = "" if bad["line"] is None else f" line {bad['line']:,}"
        raise ValueError(f"no record can be used, the first bad one is {bad['file']}{line}: {bad['error']}")

    def _check_unchanged(self) -> None:
        for source in self.sources:
            try:
                state = Path(source.path).stat()
            except FileNotFoundError:
                state = None
            if state is None or (state.st_size, state.st_mtime_ns) != (source.bytes, source.mtime_ns):
                raise ValueError(f"{source.path} changed while it was read; give the command again when it is whole")


def _working_directory(out: Path) -> Path:
    """Return where the work is done: beside the pool, or in the current directory where the pool is in an object store."""
    return (Path.cwd() if is_remote(out) else out.resolve().parent) / f".{out.name}.ingest"


def _in_use(out: Path, work: Path) -> bool:
    """Whether something is at `out`; of a pool in an object store whose upload was stopped, what is there does not count."""
    if is_remote(out):
        return (out / SUMMARY).exists() or (bool(list_files(out)) and not (work / UPLOADING).exists())
    return out.exists() and any(out.iterdir() if out.is_dir() else [out])


def _begun(work: Path, digest: str) -> Summary | None:
    """Return the summary of a pool that only was not moved; else keep finished phases of the same ingest, nothing more."""
    plan = work / "plan.json"
    if not (plan.exists() and read_json(plan)["digest"] == digest):
        if (work / UPLOADING).exists():
            raise ValueError(
                f"the upload of a pool of other sources or options to {(work / UPLOADING).read_text().strip()} was begun; "
                f"give that command again, or remove what is there and {work}"
            )
        for path in work.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(plan, {"digest": digest})
    summary = work / "pool" / SUMMARY
    return Summary(**read_json(summary)) if summary.exists() else None


def _finished(out: Path, digest: str) -> Summary:
    path = out / SUMMARY
    if path.exists():
        summary = Summary(**read_json(path))
        if summary.digest == digest:
            return summary
        raise ValueError(f"--out: {out} was made from other sources or with other options; name a new directory")
    raise ValueError(f"--out: {out} holds something else already; name a new directory")


def _upload(pool: Path, out: Path) -> None:
    """Copy a pool to an object store, the summary last: with it the pool is whole."""
    with replacing(pool.parent / UPLOADING) as temporary:
        temporary.write_text(f"{out}\n")
    for file in sorted(pool.iterdir(), key=lambda file: (file.name == SUMMARY, file.name)):
        upload(file, out / file.name)


def _digest(sources: list[Source], options: IngestOptions) -> str:
    files = [f"{source.path}|{source.bytes}|{source.mtime_ns}" for source in sources]
    return hashlib.blake2b("\n".join([options.model_dump_json(), *files]).encode(), digest_size=8).hexdigest()
