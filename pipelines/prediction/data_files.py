"""The files of examples to predict, and how each is written: Parquet, CSV, JSON lines or lines of text.

TFRecord, folders of images and object stores are not read; `distilbeam ingest` makes Parquet of the first two.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distilbeam.pipelines.ingest.sources import SUFFIXES, Source
from distilbeam.pipelines.pool.object_store import is_hidden
from distilbeam.storage.paths import is_remote

ENDINGS = {"parquet": (".parquet", ".pq"), **{name: SUFFIXES[name] for name in ("csv", "jsonl", "text")}}


@dataclass(frozen=True)
class DataFile:
    """A file of examples as it was found, and the format that it is in."""

    source: Source
    format: str

    def changed(self) -> bool:
        """Whether it is another file now."""
        path = Path(self.source.path)
        if not path.exists():
            return True
        state = path.stat()
        return (state.st_size, state.st_mtime_ns) != (self.source.bytes, self.source.mtime_ns)


def find_data(places: Sequence[str], format_: str | None, out: Path) -> list[DataFile]:
    """List the files that paths, directories and glob patterns name, sorted.

    Args:
      places: of them; a directory stands for the files below it that end as those of a format do, hidden ones passed over.
      format_: of all of them; by the end of each one's name without it.
      out: where predictions go, which must not be where files are looked for.

    Raises:
      ValueError: nothing is there, a file of an unknown ending, an unknown format, or predictions among the examples.
    """
    if format_ is not None and format_ not in ENDINGS:
        raise ValueError(
            f"--format must be one of {', '.join(ENDINGS)}, got {format_}; 'distilbeam ingest' reads others"
        )
    out = out.resolve()
    found: dict[Path, DataFile] = {}
    for place in places:
        if is_remote(place):
            raise ValueError(f"--data must be files of this machine, got {place}; copy them here")
        root = Path(place).resolve()
        if root.is_dir() and out.is_relative_to(root):
            raise ValueError(
                f"--out ({out}) must not be inside --data ({root}), where predictions would be read as examples; choose another"
            )
        for path in _files(place, format_):
            if path.resolve().is_relative_to(out):
                raise ValueError(
                    f"--data must not hold predictions, got {path}, which is inside --out; name other files"
                )
            state = path.stat()
            source = Source(str(path.resolve()), path.name, state.st_size, state.st_mtime_ns)
            found[path.resolve()] = DataFile(source, format_ or _format_of(path))
    return [found[path] for path in sorted(found)]


def _files(place: str, format_: str | None) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        below = [p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path).as_posix())]
        files = [p for p in below if _known(p) is not None and (format_ is None or _known(p) == format_)]
    elif path.exists():
        files = [path]
    else:
        files = [p for name in glob.glob(place, recursive=True) if (p := Path(name)).is_file()]  # noqa: PTH207 - absolute patterns
    if not files:
        endings = ", ".join(e for name, group in ENDINGS.items() if format_ in (None, name) for e in group)
        images = "; 'distilbeam ingest DIR --format images --out POOL' makes Parquet of a folder of images"
        why = f"no file in it ends in {endings}{images}" if path.is_dir() else "nothing is there"
        raise ValueError(f"--data must name files, directories or glob patterns, got {place}: {why}")
    return files


def _known(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((format_ for format_, endings in ENDINGS.items() if name.endswith(endings)), None)


def _format_of(path: Path) -> str:
    known = _known(path)
    if known is None:
        raise ValueError(f"--format must say how {path} is written, its name does not: one of {', '.join(ENDINGS)}")
    return known
