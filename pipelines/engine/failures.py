"""The failures of a phase: records that workers write of items that failed, read by the driver and told in a sentence."""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distilbeam.pipelines.engine.stopping import Stopped, can_pass, cannot_be_written, is_stopped
from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.paths import list_files, remove_files
from distilbeam.storage.private_folders import is_private

log = logging.getLogger("distilbeam.phases")


@contextmanager
def kept_error(name: Callable[[], str], errors: Path, private: Path) -> Iterator[None]:
    """Keep an error of the block for the driver, which reads it and raises it.

    Args:
      name: gives the item's name.
      errors: the phase's directory of errors.
      private: the driver's own folder, for where that one takes nothing any more.
    """
    try:
        yield
    except Stopped:
        pass
    except Exception as e:  # noqa: BLE001  # the boundary
        # Not raised into Beam: a runner that retries a bundle would do the neighbours' work again, four times on Dataflow,
        # and the local one ends the pipeline with a traceback that hides the sentence.
        record = {
            "item": name(),
            "type": type(e).__name__,
            "message": str(e),
            "traceback": traceback.format_exc(),
            "passes": can_pass(e),
            "stops": is_stopped(),
            "full": cannot_be_written(e),
        }
        _keep(record, errors, private)


def _keep(record: dict[str, Any], errors: Path, private: Path) -> None:
    """Write an error's record where the driver looks for it; among the driver's temporary files if the disk is full."""
    name = f"{_stable_name(record['item'])}.json"
    try:
        write_json(errors / name, record)
    except OSError:
        if not is_private(private):  # on another machine, or not the one that the driver made
            raise
        write_json(private / name, record)


def clear_failures(errors: Path, private: Path) -> None:
    """Remove the records of a former attempt; what its workers were told, to stop, stays."""
    for place in (errors, private):
        remove_files(list_files(place, "*.json"))


def read_failures(errors: Path, private: Path) -> list[dict[str, Any]]:
    """Read the records of what failed, those that stopped everybody first."""
    found = [read_json(path) for place in (errors, private) for path in sorted(list_files(place, "*.json"))]
    return sorted(found, key=lambda record: not (record["stops"] and not record["passes"]))


def are_hopeless(failed: Sequence[dict[str, Any]]) -> bool:
    """Tell whether trying again is in vain: everything that failed would fail again, or something that stopped everybody."""
    return bool(failed) and (
        any(f["stops"] and not f["passes"] for f in failed) or not any(f["passes"] for f in failed)
    )


def failure_sentence(phase: str, items: int, first_item: str, failed: Sequence[dict[str, Any]], lost: str) -> str:
    """Say what failed.

    Args:
      phase: the phase.
      items: number of items that could not be done.
      first_item: name of the first of them.
      failed: the records.
      lost: how worker processes died, if any did.
    """
    count = f"{phase}: {items} item(s) could not be done"
    if lost and not failed:
        less = "; give workers less to hold (engine.batch_rows, engine.shard_rows) or more memory"
        return f"{count}, the first {first_item}: {lost}{less if 'worker processes died' in lost else ''}"
    if not failed:
        return f"{count} although the runner reported success, the first {first_item}; run the same command again to repeat them"
    first = failed[0]
    log.debug("first failure of %s:\n%s", phase, first["traceback"])
    sentence = first["type"] in ("ValueError", "DamagedFileError", "TeacherMisfit", "TooManyFailures")
    message = first["message"] if sentence else f"{first['type']}: {first['message']}"
    way_out = (
        "; what was answered is kept: make room, or let it be written to, and start again" if first["full"] else ""
    )
    return f"{count}, the first {first['item']}: {message}{way_out}"


def _stable_name(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
