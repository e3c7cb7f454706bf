"""The messages of TensorFlow Serving without TensorFlow.

The generated modules of `tensorflow_serving` import those of `tensorflow.core`, and importing anything below
`tensorflow` executes the whole package: seconds and hundreds of megabytes in every worker. The message modules
themselves need nothing of it. While they are imported, `tensorflow` and the packages below it are therefore stood in
for by empty namespace packages with the same folders; afterwards these names are taken away again, so that a later
`import tensorflow` finds nothing of ours and runs as ever. The protobuf runtime keeps one class per message, whichever
module asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_lock = threading.Lock()
_NAMES = ("predict_pb2", "get_model_metadata_pb2", "get_model_status_pb2")


class Messages:
    """The message classes that client and server use.

    Attributes:
      predict: module of PredictRequest and PredictResponse.
      metadata: module of GetModelMetadataRequest, GetModelMetadataResponse and SignatureDefMap.
      status: module of GetModelStatusRequest and GetModelStatusResponse.
      tensor: class TensorProto.
    """

    def __init__(self, predict: Any, metadata: Any, status: Any) -> None:
        self.predict, self.metadata, self.status = predict, metadata, status
        self.tensor: Any = type(predict.PredictRequest().inputs[""])


_messages: Messages | None = None
_example: Any = None


def load_messages() -> Messages:
    """Import the message modules, once per process.

    Returns:
      The messages.

    Raises:
      ValueError: tensorflow-serving-api is not installed.
    """
    global _messages
    with _lock:
        if _messages is None:
            _messages = _without_tensorflow(_import)
        return _messages


def load_example() -> Any:
    """Import the message class tf.Example (`tensorflow.train.Example`), once per process.

    Raises:
      ValueError: tensorflow-serving-api, which brings TensorFlow's messages, is not installed.
    """
    global _example
    with _lock:
        if _example is None:
            module = _without_tensorflow(lambda: importlib.import_module("tensorflow.core.example.example_pb2"))
            _example = module.Example
        return _example


def _without_tensorflow(load: Callable[[], Any]) -> Any:
    """Import message modules; see the module."""
    if "tensorflow" in sys.modules:
        return load()
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError("TensorFlow Serving's messages are not installed; install tensorflow-serving-api")
    before = set(sys.modules)
    finder = _EmptyPackages(list(spec.submodule_search_locations))
    sys.meta_path.insert(0, finder)
    try:
        return load()
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name == "tensorflow" or name.startswith("tensorflow."):
                del sys.modules[name]


def _import() -> Messages:
    try:
        modules = [importlib.import_module(f"tensorflow_serving.apis.{name}") for name in _NAMES]
    except ModuleNotFoundError as e:
        raise ValueError(f"TensorFlow Serving's messages need {e.name}; install tensorflow-serving-api") from e
    return Messages(*modules)


class _EmptyPackages:
    """Finds packages below `tensorflow` without their `__init__.py`."""

    def __init__(self, roots: list[str]) -> None:
        self._roots = roots

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del target
        if name == "tensorflow":
            return self._package(name, self._roots)
        if not name.startswith("tensorflow.") or path is None:
            return None
        folders = [str(Path(parent) / name.rpartition(".")[2]) for parent in path]
        return self._package(name, [folder for folder in folders if Path(folder).is_dir()])

    def _package(self, name: str, folders: list[str]) -> ModuleSpec | None:
        if not folders:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = folders
        return spec
