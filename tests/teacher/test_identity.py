"""A fingerprint changes with whatever decides the answers, and with nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from distilbeam.teacher import load_teacher
from distilbeam.teacher.sources import argument_files, source_files

INPUT = {"column": "x"}
NETS = """
import torch
from beside import WIDTH
import torch.nn.functional as F

class Net(torch.nn.Module):
    def __init__(self, weights=None, nested=None, log=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, WIDTH)
    def forward(self, x):
        return self.layer(x)

def twice(batch):
    import numpy
    from parts.deep import factor
    return factor() * numpy.stack(batch["x"].to_pylist()).astype("float32")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "unrelated.py").write_text("WIDTH = 4\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "deep.py").write_text("def factor():\n    return 2\n")
    (tmp_path / "front.py").write_text("from nets import Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nets", "beside", "unrelated", "parts", "parts.deep", "front"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint(**settings: Any) -> str:
    teacher = load_teacher({"kind": "torch", "model": "nets:Net", "input": INPUT, **settings})
    try:
        return teacher.fingerprint()
    finally:
        teacher.close()


def changes(folder: Path, name: str, make: Callable[[], str]) -> bool:
    """Tell whether another line in a file changes a fingerprint."""
    before, path = make(), folder / name
    former = path.read_bytes()
    path.write_bytes(former + b"\n# another\n")
    after = make()
    path.write_bytes(former)
    assert make() == before
    return after != before


def test_the_source_of_a_factory_and_what_it_imports_decide(folder: Path) -> None:
    assert changes(folder, "nets.py", fingerprint)
    assert changes(folder, "beside.py", fingerprint)
    assert not changes(folder, "unrelated.py", fingerprint)
    through = lambda: fingerprint(model="front:Net")  # noqa: E731
    assert changes(folder, "nets.py", through)
    assert changes(folder, "beside.py", through)


def test_the_source_of_a_function_of_the_input_decides(folder: Path) -> None:
    make = lambda: fingerprint(input={"kind": "function", "columns": ["x"], "function": "nets:twice"})  # noqa: E731
    assert changes(folder, "parts/deep.py", make)
    assert changes(folder, "nets.py", make)


def test_files_that_the_arguments_name_decide(folder: Path) -> None:
    (folder / "w.npz").write_bytes(b"1")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "prompt.txt").write_text("Which?")
    (folder / "asked.log").write_text("1")
    nested = {"folder": "model", "files": ["prompt.txt", "a sentence", "no.npz"]}
    make = lambda: fingerprint(arguments={"weights": "w.npz", "nested": nested, "log": "asked.log"})  # noqa: E731
    assert changes(folder, "w.npz", make)
    assert changes(folder, "model/config.json", make)
    assert changes(folder, "prompt.txt", make)
    assert not changes(folder, "asked.log", make)  # what the teacher writes


def test_a_fingerprint_of_what_was_complete_stays(folder: Path) -> None:
    """That of the first releases: the weights, the factory's own module, the settings."""
    import hashlib
    import json

    import torch

    (folder / "alone.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 3)\n")
    torch.manual_seed(0)
    save_file(torch.nn.Linear(4, 3).state_dict(), folder / "w.safetensors")
    config = {"kind": "torch", "model": "alone:make", "weights": "w.safetensors", "input": INPUT}
    teacher: Any = load_teacher(config)
    include = {"arguments", "output", "dtype", "input"}
    data = teacher._config.model_dump(mode="json", include=include, exclude={"input": {"tokenizer"}})
    whole = hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8)
    for name, path in (("0", "w.safetensors"), ("1", "alone.py")):
        whole.update(f"\n{name}\n".encode())
        whole.update(hashlib.blake2b((folder / path).read_bytes(), digest_size=16).digest())
    assert teacher.fingerprint() == f"torch:alone:make:{whole.hexdigest()}"


@pytest.mark.usefixtures("folder")
def test_what_the_numbers_are_and_their_order_decide() -> None:
    assert len({fingerprint(answers=kind) for kind in ("logits", "log-probabilities", "probabilities")}) == 3
    assert fingerprint(answers="logits") == fingerprint()
    config = {"kind": "torch", "model": "nets:Net", "input": INPUT, "classes": ["a", "b", "c"]}
    orders = [["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"]]
    found = [load_teacher(config, classes=order).fingerprint() for order in orders]
    assert len(set(found)) == 3
    assert found[0] == fingerprint()


def test_installed_modules_are_not_followed() -> None:
    files = source_files("torch.nn:Linear", "teacher.model")
    assert [Path(file).name for file in files] == ["__init__.py", "linear.py"]


@pytest.mark.parametrize("value", ["", " ", "\0", "x" * 5000, ".", 3, None, {"a": []}])
def test_what_is_no_path_is_passed_over(value: Any) -> None:
    assert argument_files({"a": value}) == []


def external_onnx(folder: Path, location: str, file: Path) -> Path:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    helper = onnx.helper
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=key, value=value)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(weights.tobytes())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return folder / "net.onnx"


def test_weights_of_an_onnx_file_decide_wherever_they_lie_beside_it(tmp_path: Path) -> None:
    weights = tmp_path / "parts" / "w.bin"
    path = external_onnx(tmp_path, "parts/w.bin", weights)
    config = {"kind": "onnx", "model": str(path), "input": INPUT}
    before = load_teacher(config).fingerprint()
    weights.write_bytes(weights.read_bytes()[::-1])
    assert load_teacher(config).fingerprint() != before


def test_weights_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {"kind": "onnx", "model": str(tmp_path / "model" / "net.onnx"), "input": INPUT}
    external_onnx(tmp_path / "model", "../w.bin", tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"keeps weights in ../w.bin, outside of its folder"):
        load_teacher(config)
    external_onnx(tmp_path / "model", "gone.bin", tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"keeps weights in gone.bin, which is not beside it"):
        load_teacher(config)
    (tmp_path / "model" / "link.bin").symlink_to(tmp_path / "w.bin")
    external_onnx(tmp_path / "model", "link.bin", tmp_path / "w.bin")
    with pytest.raises(ValueError, match=r"keeps weights in link.bin, a link out of its folder"):
        load_teacher(config)
