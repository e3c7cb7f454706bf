"""The files of examples to predict, and how each is written: Parquet, CSV, JSON lines, lines of text, or images.

The images of a folder are one source of examples, in the order of their names: as many files of predictions as images would be
too many. TFRecord and object stores are not read; `distilbeam ingest` makes Parquet of the first.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distilbeam.pipelines.ingest.sources import SUFFIXES, Source
from distilbeam.pipelines.pool.object_store import is_hidden
from distilbeam.storage.paths import is_remote

ENDINGS = {
    "parquet": (".parquet", ".pq"),
    **{name: SUFFIXES[name] for name in ("csv", "jsonl", "text")},
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"),
}


@dataclass(frozen=True)
class DataFile:
    """A file of examples as it was found, and the format that it is in; or the images of a folder, whose paths `images` has."""

    source: Source
    format: str
    images: tuple[str, ...] = ()

    def changed(self) -> bool:
        """Whether it is another file now, or one of the images is."""
        try:
            now = _state([Path(image) for image in self.images]) if self.images else _state(Path(self.source.path))
        except FileNotFoundError:
            return True
        return now != (self.source.bytes, self.source.mtime_ns)


def find_data(places: Sequence[str], format_: str | None, out: Path, of_images: bool = False) -> list[DataFile]:
    """List the files that paths, directories and glob patterns name, sorted.

    Args:
      places: of them; a directory stands for the files below it that end as those of a format do, hidden ones passed over.
      format_: of all of them; by the end of each one's name without it.
      out: where predictions go, which must not be where files are looked for.
      of_images: whether images are wanted: of a directory images and Parquet are taken, else everything but images.

    Raises:
      ValueError: nothing is there, a file of an unknown ending, an unknown format, or predictions among the examples.
    """
    if format_ is not None and format_ not in ENDINGS:
        raise ValueError(
            f"--format must be one of {', '.join(ENDINGS)}, got {format_}; 'distilbeam ingest' reads others"
        )
    out = out.resolve()
    wanted = ("parquet", "images") if of_images else tuple(name for name in ENDINGS if name != "images")
    found: dict[Path, DataFile] = {}
    images: dict[Path, set[Path]] = {}
    for place in places:
        if is_remote(place):
            raise ValueError(f"--data must be files of this machine, got {place}; copy them here")
        root = Path(place).resolve()
        if root.is_dir() and out.is_relative_to(root):
            raise ValueError(
                f"--out ({out}) must not be inside --data ({root}), where predictions would be read as examples; choose another"
            )
        for path in _files(place, (format_,) if format_ else wanted):
            if path.resolve().is_relative_to(out):
                raise ValueError(
                    f"--data must not hold predictions, got {path}, which is inside --out; name other files"
                )
            name, whole = format_ or _format_of(path), path.resolve()
            if name == "images":
                images.setdefault(whole.parent, set()).add(whole)
            else:
                found[whole] = DataFile(Source(str(whole), path.name, *_state(path)), name)
    for folder, members in images.items():
        paths = sorted(members)
        found[folder] = DataFile(Source(str(folder), folder.name, *_state(paths)), "images", tuple(map(str, paths)))
    return [found[path] for path in sorted(found)]


def _state(place: Path | Iterable[Path]) -> tuple[int, int]:
    """Bytes and time of change of a file; of images their bytes together, and a number that is another one when one is changed."""
    if isinstance(place, Path):
        state = place.stat()
        return state.st_size, state.st_mtime_ns
    states = [(path.name, *_state(path)) for path in place]
    digest = hashlib.blake2b(repr([(name, size, time) for name, size, time in states]).encode(), digest_size=7)
    return sum(size for _, size, _ in states), int.from_bytes(digest.digest(), "big")


def _files(place: str, formats: Sequence[str]) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        below = [p for p in path.rglob("*") if p.is_file() and not is_hidden(p.relative_to(path).as_posix())]
        files = [p for p in below if _known(p) in formats]
    elif path.exists():
        files = [path]
    else:
        files = [p for name in glob.glob(place, recursive=True) if (p := Path(name)).is_file()]  # noqa: PTH207 - absolute patterns
    if not files:
        endings = ", ".join(ending for name in formats for ending in ENDINGS[name])
        why = f"no file in it ends in {endings}" if path.is_dir() else "nothing is there"
        raise ValueError(f"--data must name files, directories or glob patterns, got {place}: {why}")
    return files


def _known(path: Path) -> str | None:
    whole = path.name.lower()
    name = whole.removesuffix(".gz").removesuffix(".zst")
    return next(
        (of for of, endings in ENDINGS.items() if (whole if of == "images" else name).endswith(endings)),
        None,
    )


def _format_of(path: Path) -> str:
    known = _known(path)
    if known is None:
        raise ValueError(f"--format must say how {path} is written, its name does not: one of {', '.join(ENDINGS)}")
    return known
