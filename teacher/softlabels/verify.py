"""The verification of a soft-label dataset: it is whole, and its teacher still says the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.text import Text
from scipy.special import softmax

from distilbeam.storage.paths import joined, list_files, on_disk, readable
from distilbeam.teacher.predict import ask
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.softlabels.codec import SoftLabels, decode
from distilbeam.teacher.softlabels.columns import SPEC_KEY, check_columns
from distilbeam.teacher.softlabels.comparison import UNLIKELY, Comparison
from distilbeam.teacher.softlabels.manifest import Manifest, ManifestEntry, read_manifest
from distilbeam.teacher.softlabels.plain_table import PlainTable
from distilbeam.teacher.softlabels.shards import has_checksum
from distilbeam.teacher.softlabels.spec import SoftLabelSpec
from distilbeam.teacher.softlabels.verify_tokens import compare_blocks, other_tokenizer, wrong_block

_BLOCK_BYTES = 2**26  # of labels of tokens that are looked at together


@dataclass(frozen=True)
class Verification:
    """The result of `verify_labels`; printing it with rich shows it.

    Attributes:
      directory: the folder of the soft-label dataset.
      shards: shards that were checked.
      rows: rows that they have.
      problems: sentences, one for each thing that is wrong.
      notes: sentences about what is unusual but not wrong.
      comparison: what labelling a sample again gave, or None.
    """

    directory: Path
    shards: int
    rows: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    comparison: Comparison | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {**asdict(self), "directory": str(self.directory), "ok": self.ok}

    def __rich__(self) -> RenderableType:
        """Show the result."""
        parts: list[RenderableType] = [Text(f"{self.shards:,} shards with {self.rows:,} rows in {self.directory}")]
        if self.comparison is not None:
            table = PlainTable(title="A sample labelled again", show_header=False, title_justify="left")
            table.add_row("rows", f"{self.comparison.rows:,}")
            table.add_row("not answered now", f"{self.comparison.failed:,}")
            difference = f"{self.comparison.largest_difference:.2e} (row {self.comparison.example_id})"
            table.add_row("largest difference of a probability", difference)
            if self.comparison.control is not None:
                table.add_row("of two answers now (control)", f"{self.comparison.control:.2e}")
            parts.append(table)
        parts += [Text(f"note: {note}", "yellow") for note in self.notes]
        parts += [Text(f"wrong: {problem}", "bold red") for problem in self.problems]
        return Group(*parts, Text("everything is as the manifest says", "green") if self.ok else Text(""))


def verify_labels(
    path: str | Path,
    teacher: Teacher | None = None,
    *,
    sample: int = 256,
    tolerance: float = 2e-3,
    batch_size: int = 256,
    seed: int = 0,
    complete: Callable[[pa.Table], pa.Table] | None = None,
) -> Verification:
    """Check a soft-label dataset.

    Sizes, checksums, footers, columns, row counts and distributions of all shards are checked, and that no example_id
    is there twice. With a teacher a random sample is labelled again; its columns must be among the carried ones, or
    `complete` adds them.

    Args:
      path: folder of the soft-label dataset.
      teacher: who labels the sample; of labels of tokens one that answers blocks in the form of `verify_tokens.wanted_form`.
      sample: rows to label again.
      tolerance: largest difference of a probability that is no problem. Rounding to half precision alone moves a
        probability by up to 2e-4.
      batch_size: most rows in one request to the teacher.
      seed: seed of the draw of the rows that are labelled again.
      complete: adds to rows of the labels the columns that the teacher reads and they do not carry.

    Returns:
      The result.

    Raises:
      ValueError: there is no manifest, or it cannot be read.
      TeacherUnavailable: the teacher cannot be reached.
    """
    manifest = read_manifest(path)
    problems: list[str] = []
    sound: list[ManifestEntry] = []
    for entry in manifest.entries:
        found = list(_problems_of(joined(manifest.directory, entry.path), entry))
        problems += found
        if not found:
            sound.append(entry)
    problems += _duplicates(manifest.directory, sound)
    comparison = None
    if teacher is not None and sound:
        rows = _random_rows(manifest.directory, sound, sample, np.random.default_rng(seed))
        rows = rows if complete is None else complete(rows)
        if manifest.spec.unit == "example":
            comparison = _compare(manifest.spec, rows, teacher, batch_size)
        elif not (others := list(other_tokenizer(manifest.spec, teacher))):
            comparison = compare_blocks(manifest.spec, rows, teacher)
        else:
            problems += others
    if comparison is not None:
        problems += _comparison_problems(comparison, tolerance, manifest.spec)
    notes = _orphans(manifest)
    return Verification(manifest.directory, len(manifest.entries), manifest.rows, tuple(problems), notes, comparison)


def _problems_of(path: Path, entry: ManifestEntry) -> Iterator[str]:
    try:
        with on_disk(path) as copy:
            yield from _shard_problems(path, copy, entry)
    except FileNotFoundError:
        yield f"{path} is missing; label its rows again after removing its manifest entry"


def _shard_problems(path: Path, copy: Path, entry: ManifestEntry) -> Iterator[str]:
    if (size := copy.stat().st_size) != entry.bytes:
        yield f"{path} must have {entry.bytes:,} bytes, it has {size:,}"
        return
    try:
        if not has_checksum(copy, entry.checksum):
            yield f"{path} must have the checksum {entry.checksum}; it was changed after it was committed"
            return
        with pq.ParquetFile(copy, page_checksum_verification=True) as file:
            yield from _content_problems(path, file, entry)
    except (OSError, pa.ArrowException, ValueError) as e:
        yield f"{path}: {str(e).splitlines()[0]}"


def _content_problems(path: Path, file: pq.ParquetFile, entry: ManifestEntry) -> Iterator[str]:
    check_columns(file.schema_arrow, entry.spec)
    footer = (file.metadata.metadata or {}).get(SPEC_KEY)
    if footer is None:
        yield f"{path} has no specification in its footer"
    elif differences := SoftLabelSpec.from_json(footer).differences(entry.spec):
        yield f"{path} and its manifest entry differ in {', '.join(differences)}"
    missing = [name for name in ("example_id", *entry.spec.carried) if name not in file.schema_arrow.names]
    if missing:
        yield f"{path} must have the columns {', '.join(missing)}"
    if file.metadata.num_rows != entry.rows:
        yield f"{path} must have {entry.rows:,} rows, it has {file.metadata.num_rows:,}"
    if not missing:
        if entry.spec.unit == "token":
            yield from _block_problems(path, file, entry.spec)
            return
        rows = 0
        for batch in file.iter_batches(8192):
            bad = np.flatnonzero(~_is_distribution(decode(batch, entry.spec)))
            if len(bad):
                yield f"{path}: the probabilities of row {rows + int(bad[0]):,} must sum to one"
                return
            rows += len(batch)


def _block_problems(path: Path, file: pq.ParquetFile, spec: SoftLabelSpec) -> Iterator[str]:
    rows = 0
    for batch in file.iter_batches(max(1, _BLOCK_BYTES // spec.label_bytes)):
        if (found := wrong_block(batch, spec)) is not None:
            yield f"{path}: block {rows + found[0]:,} {found[1]}"
            return
        rows += len(batch)


def _is_distribution(labels: SoftLabels) -> npt.NDArray[np.bool_]:
    logprobs = labels.logprobs.astype(np.float64)
    probabilities = np.exp(logprobs)
    total = probabilities.sum(axis=1)
    if labels.tail_logmass is not None:
        total = total + np.exp(labels.tail_logmass.astype(np.float64))
    with np.errstate(invalid="ignore"):
        entropy = -np.where(probabilities > 0, probabilities * logprobs, 0).sum(axis=1)
    # what rounding to half precision can do (see codec), and as much again for float32
    return np.asarray((logprobs <= 0).all(axis=1) & (np.abs(total - 1) <= 2.0**-10 * entropy + 1e-5))


def _duplicates(directory: Path, entries: list[ManifestEntry]) -> list[str]:
    if not entries:
        return []
    files = (readable(joined(directory, entry.path)) for entry in entries)
    tables = [
        pq.read_table(file, columns=["example_id"], partitioning=None, page_checksum_verification=True)
        for file in files
    ]
    ids = pa.concat_tables(table.cast(pa.schema([("example_id", pa.large_binary())])) for table in tables)["example_id"]
    extra = len(ids) - pc.count_distinct(ids).as_py()
    return [f"{extra:,} rows have an example_id that another row has too; label into an empty folder"] if extra else []


def _orphans(manifest: Manifest) -> tuple[str, ...]:
    known = {path.resolve() for path in manifest.paths()}
    orphans = sorted(p.name for p in list_files(manifest.directory, "*.parquet") if p.resolve() not in known)
    if not orphans:
        return ()
    shown = ", ".join(orphans[:3]) + (", …" if len(orphans) > 3 else "")
    return (
        f"{len(orphans):,} Parquet files belong to no manifest entry and are not read ({shown}); they may be removed",
    )


def _compare(spec: SoftLabelSpec, rows: pa.Table, teacher: Teacher, batch_size: int) -> Comparison:
    answers = ask(teacher, rows.combine_chunks().to_batches()[0], spec.num_classes, batch_size=batch_size)
    answered = np.flatnonzero(answers.ok)
    if not len(answered):
        return Comparison(len(rows), len(rows), math.nan, "none", teacher.fingerprint() == spec.teacher)
    probabilities = softmax(answers.logits[answered].astype(np.float64) / spec.temperature, axis=1)
    differences = _differences(decode(rows.take(answered), spec), probabilities, spec)
    worst = int(differences.argmax())
    example_id = rows["example_id"][int(answered[worst])].as_py()
    shown = example_id.hex() if isinstance(example_id, bytes) else str(example_id)
    same = teacher.fingerprint() == spec.teacher
    return Comparison(len(rows), len(rows) - len(answered), float(differences[worst]), shown, same)


def _differences(stored: SoftLabels, now: npt.NDArray[np.float64], spec: SoftLabelSpec) -> npt.NDArray[np.float64]:
    """Return each row's largest difference of a kept class's probability."""
    if stored.classes is None:
        return np.asarray(np.abs(np.exp(stored.logprobs) - now).max(axis=1))
    kept = np.take_along_axis(now, np.maximum(stored.classes, 0), axis=1)
    difference = np.where(stored.classes >= 0, np.abs(np.exp(stored.logprobs) - kept), 0)
    if spec.kind == "sampled":
        chance = np.sqrt(2 * kept * (1 - kept) * UNLIKELY / spec.width) + UNLIKELY / (3 * spec.width)
        difference = np.maximum(difference - chance, 0)
    return np.asarray(difference.max(axis=1))


def _random_rows(directory: Path, entries: list[ManifestEntry], sample: int, rng: np.random.Generator) -> pa.Table:
    sizes = np.array([entry.rows for entry in entries])
    chosen = np.sort(rng.choice(sizes.sum(), min(sample, int(sizes.sum())), replace=False))
    shard = np.searchsorted(np.cumsum(sizes), chosen, side="right")
    starts = np.cumsum(sizes) - sizes
    tables = [
        pq.read_table(
            readable(joined(directory, entries[i].path)), partitioning=None, page_checksum_verification=True
        ).take(chosen[shard == i] - starts[i])
        for i in np.unique(shard).tolist()
    ]
    return pa.concat_tables(tables, promote_options="default")


def _comparison_problems(comparison: Comparison, tolerance: float, spec: SoftLabelSpec) -> Iterator[str]:
    if not comparison.same_teacher:
        yield f"the labels are of the teacher {spec.teacher or 'unknown'}, another one was given to compare with"
    if comparison.failed:
        yield f"the teacher cannot answer {comparison.failed:,} of {comparison.rows:,} rows that it has labelled"
    if comparison.largest_difference > tolerance:
        yield (
            f"the teacher's probabilities differ by up to {comparison.largest_difference:.3g} from the stored ones "
            f"(row {comparison.example_id}), more than {tolerance:g}"
            + ("" if comparison.control is None else f"; two answers of it now differ by {comparison.control:.3g}")
        )
