"""Standard error for our sentences alone: what libraries print by themselves is switched off before they are imported.

Most of them read the environment when they are imported, which worker processes inherit; TensorFlow writes its first lines
from C++ before anything can be set, so that its import is kept apart. `--debug` and `--log-level debug` leave everything on.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_SET = "DISTILBEAM_QUIET"
_ENVIRONMENT = {
    "ABSL_LOGGING_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "NONE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TORCH_LOGS": "-all",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def wants_everything(arguments: Sequence[str]) -> bool:
    """Tell whether a command line asks for what libraries print: `--debug`, or the log level debug."""
    own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    levels = [own[i + 1] for i, word in enumerate(own[:-1]) if word == "--log-level"]
    levels += [word.partition("=")[2] for word in own if word.startswith("--log-level=")]
    return "--debug" in own or "debug" in levels


def keep_quiet() -> None:
    """Switch off what libraries print in this process and in those that it starts; what the user has set stays."""
    for name, value in {**_ENVIRONMENT, _SET: "1"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names each of its libraries that is for other hardware
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def drop_beam_import_line() -> None:
    """Drop what Beam logs when it is imported without the extra gcp, which nothing of ours needs, or with Pub/Sub's client alone."""
    for name in ("", "apache_beam.io.filesystems"):  # a logger's filter sees no record of the loggers below it
        logging.getLogger(name).addFilter(_is_no_import_line)


def _is_no_import_line(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("apitools not found", "Failed to import GCSFileSystem"))


@contextmanager
def native_lines_dropped() -> Iterator[None]:
    """Drop what native code writes to standard error in the block, where `keep_quiet` was called; not what Python raises."""
    if _SET not in os.environ:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
