"""The optional extras of the package: which one something needs, and the sentence, before any work, where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

MODULES = {
    "compress": ("torch_pruning",),
    "dask": ("dask", "distributed"),
    "gcp": ("gcsfs", "upath"),
    "hf": ("transformers",),
    "kafka": ("confluent_kafka",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "pubsub": ("google.cloud.pubsub_v1",),
    "s3": ("s3fs", "upath"),
    "tensorboard": ("tensorboard",),
    "tfrecord": ("google_crc32c",),
    "tune": ("optuna",),
    "wandb": ("wandb",),
}


@dataclass(frozen=True)
class Need:
    """Something that needs an extra.

    Attributes:
      what: the setting or option with its value, as the user wrote it.
      extra: name of the extra.
      modules: what is imported of it; None for all that `MODULES` says.
      way_round: how to do without, as the end of a sentence.
    """

    what: str
    extra: str
    modules: tuple[str, ...] | None = None
    way_round: str = ""

    def missing(self) -> list[str]:
        """List the modules that are not installed."""
        wanted = MODULES[self.extra] if self.modules is None else self.modules
        return [name for name in wanted if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package that it is in
        return False


def require_extras(needs: Iterable[Need]) -> None:
    """Check that what is needed is installed, without importing it.

    Args:
      needs: what is about to be used.

    Raises:
      ValueError: something is not; a line for each.
    """
    sentences = [
        f"{need.what} needs {' and '.join(missing)}, which is not installed: pip install 'distilbeam[{need.extra}]'"
        f"{need.way_round and f', or {need.way_round}'}"
        for need in needs
        if (missing := need.missing())
    ]
    if sentences:
        raise ValueError("\n".join(dict.fromkeys(sentences)))
