"""Reading a program runs nothing of what is in it; each attack is shown to work on torch's own reader first."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distilbeam.student.export.runtimes import open_runner
from distilbeam.teacher import load_teacher
from distilbeam.teacher.programs import UntrustedProgram, load_program, training_operator

Parts = dict[str, bytes]
INPUT = {"column": "x"}


class Net(torch.nn.Module):
    def __init__(self, training_parts: bool = False) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.constant = torch.arange(3.0)
        self.dropout = torch.nn.Dropout(0.3 if training_parts else 0.0)
        self.norm = torch.nn.BatchNorm1d(3) if training_parts else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "logits": self.norm(self.dropout(self.linear(x))) + self.constant,
            "twice": x.reshape(x.shape[0] * 2, 2),
        }


def exported(path: Path, module: torch.nn.Module | None = None) -> Path:
    rows = torch.export.Dim("rows", min=2, max=1000)
    module = Net().eval() if module is None else module
    torch.export.save(torch.export.export(module, (torch.zeros(6, 4),), dynamic_shapes=({0: rows},)), path)
    return path


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def parts_of(path: Path) -> Parts:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(source: Path, target: Path, change: Callable[[Parts], None]) -> Path:
    parts = parts_of(source)
    root = next(iter(parts)).split("/", 1)[0]
    inner = {name.split("/", 1)[1]: data for name, data in parts.items()}
    change(inner)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in inner.items():
            archive.writestr(f"{root}/{name}", data)
    return target


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((((torch.zeros(6, 4), Touch(path)),), {}), buffer)
    return buffer.getvalue()


def program_of(parts: Parts) -> Any:
    return json.loads(parts["models/model.json"])


def in_sample_inputs(parts: Parts, mark: Path) -> None:
    parts["data/sample_inputs/model.pt"] = pickled(mark)


def in_weights(parts: Parts, mark: Path) -> None:
    config = json.loads(parts["data/weights/model_weights_config.json"])
    payload = config["config"]["linear.weight"]
    payload["use_pickle"] = True
    buffer = io.BytesIO()
    torch.save(Touch(mark), buffer)
    parts[f"data/weights/{payload['path_name']}"] = buffer.getvalue()
    parts["data/weights/model_weights_config.json"] = json.dumps(config).encode()


def in_opaque_constants(parts: Parts, mark: Path) -> None:
    config = json.loads(parts["data/constants/model_constants_config.json"])
    payload = next(iter(config["config"].values()))
    payload |= {"use_pickle": True, "path_name": "opaque_obj_0"}
    parts["data/constants/opaque_obj_0"] = pickle.dumps(Touch(mark))
    parts["data/constants/model_constants_config.json"] = json.dumps(config).encode()


def in_shapes(parts: Parts, mark: Path) -> None:
    text = parts["models/model.json"].decode()
    program = json.loads(text)

    def poison(value: Any) -> None:
        if isinstance(value, dict):
            if "expr_str" in value:
                value["expr_str"] = f"__import__('pathlib').Path({str(mark)!r}).touch() or Integer(2)"
            for part in value.values():
                poison(part)
        elif isinstance(value, list):
            for part in value:
                poison(part)

    poison(program)
    parts["models/model.json"] = json.dumps(program).encode()


def in_guards(parts: Parts, mark: Path) -> None:
    program = program_of(parts)
    program["guards_code"] = [f"__import__('pathlib').Path({str(mark)!r}).touch() is None"]
    parts["models/model.json"] = json.dumps(program).encode()


def in_the_nesting(parts: Parts, mark: Path) -> None:
    program = program_of(parts)
    (entry,) = program["graph_module"]["module_call_graph"][:1]
    spec = json.loads(entry["signature"]["out_spec"])
    (mark.parent / f"imported_{mark.parent.name}.py").write_text(f"open({str(mark)!r}, 'w').close()")
    fqn = f"imported_{mark.parent.name}:Anything"
    spec[1]["context"] = json.dumps([{"__enum__": True, "fqn": fqn, "name": "a"}, "twice"])
    entry["signature"]["out_spec"] = json.dumps(spec)
    parts["models/model.json"] = json.dumps(program).encode()


ATTACKS = {
    "sample inputs": (in_sample_inputs, "data/sample_inputs/model.pt holds a pickle of more than tensors"),
    "weights": (in_weights, "its weight or constant 'linear.weight' is a pickle"),
    "constants": (in_opaque_constants, "its weight or constant 'constant' is a pickle"),
    "shapes": (in_shapes, "it has a expr_str that torch does not write"),
    "guards": (in_guards, "it has a guards_code that torch does not write"),
    "nesting": (in_the_nesting, "the nesting of its inputs or outputs names Python objects"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_in_a_program_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    attack, why = ATTACKS[name]
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "executed"
    path = rewritten(exported(tmp_path / "good.pt2"), tmp_path / "bad.pt2", lambda parts: attack(parts, mark))
    with pytest.raises(UntrustedProgram, match=rf"teacher.model: .*bad.pt2 could run code of whoever made it: {why}"):
        load_teacher({"kind": "torch", "model": str(path), "input": INPUT})
    with pytest.raises(ValueError, match=r"the export: .*bad.pt2 could run code .*trust = true"):
        open_runner(path)
    assert not mark.exists()
    with contextlib.suppress(Exception):  # torch runs it, for a user who says so; what comes after it may fail
        load_program(path, "teacher.model", trust=True).module()(torch.zeros(6, 4))
    assert mark.exists()


def test_trust_is_said_in_the_configuration(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = rewritten(exported(tmp_path / "good.pt2"), tmp_path / "own.pt2", lambda parts: in_guards(parts, mark))
    config = {"kind": "torch", "model": str(path), "input": INPUT, "output": "logits", "trust": True}
    load_teacher(config).close()


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("torch.hub.load", False),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.load_library", False),
        ("torch.ops.aten.add.__class__", False),
        ("torch.ops.mine.anything.default", False),
        ("_operator.attrgetter", False),
        ("_operator.call", False),
        ("builtins.eval", False),
        ("#mine:op", False),
        ("torch.ops.aten.linear.default", True),
        ("torch.ops.aten.__and__.Tensor", True),
        ("torch.ops.higher_order.cond", True),
        ("_operator.floordiv", True),
        ("torch.sym_float", True),
    ],
)
def test_operators_are_torchs(tmp_path: Path, target: str, allowed: bool) -> None:
    def change(parts: Parts) -> None:
        program = program_of(parts)
        node = next(n for n in program["graph_module"]["graph"]["nodes"] if n["target"].endswith("linear.default"))
        node["target"] = target
        parts["models/model.json"] = json.dumps(program).encode()

    path = rewritten(exported(tmp_path / "good.pt2"), tmp_path / "bad.pt2", change)
    if target.endswith("linear.default"):
        load_program(path, "teacher.model")
        return
    with pytest.raises(ValueError, match=r"teacher.model: ") as caught:
        load_program(path, "teacher.model")
    assert isinstance(caught.value, UntrustedProgram) is not allowed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/aotinductor/model/lib.so", "it holds data/aotinductor/model/lib.so, which is no part"),
        ("MODELS/model.json", "two of its parts have the same name"),
        ("code/__torch__.py", "it holds code/__torch__.py, which is no part"),
    ],
)
def test_foreign_parts_are_refused(tmp_path: Path, name: str, message: str) -> None:
    path = rewritten(exported(tmp_path / "good.pt2"), tmp_path / "bad.pt2", lambda parts: parts.update({name: b"x"}))
    with pytest.raises(UntrustedProgram, match=message):
        load_program(path, "teacher.model")


@pytest.mark.parametrize("placeholder", ["x=print", "x):\n    import os\n    def f(y", "class"])
def test_names_are_names(tmp_path: Path, placeholder: str) -> None:
    def change(parts: Parts) -> None:
        text = parts["models/model.json"].decode()
        parts["models/model.json"] = text.replace('"name": "x"', f'"name": {json.dumps(placeholder)}').encode()

    path = rewritten(exported(tmp_path / "good.pt2"), tmp_path / "bad.pt2", change)
    with pytest.raises(UntrustedProgram, match=r"it has a name that torch does not write"):
        load_program(path, "teacher.model")


def test_the_format_of_older_releases_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        for name in ("version", "serialized_exported_program.json", "serialized_state_dict.pt"):
            archive.writestr(f"archive/{name}", b"1")
    with pytest.raises(UntrustedProgram, match=r"in the format of torch before 2.8, whose parts are unpickled"):
        load_program(tmp_path / "old.pt2", "teacher.model")


def test_a_state_dict_is_no_program(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "state.pt2")
    with pytest.raises(ValueError, match=r"state.pt2 is not a torch.export program|could run code"):
        load_program(tmp_path / "state.pt2", "teacher.model")


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(50, 8)
            self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            seen = self.layer(self.embed(ids), src_key_padding_mask=~mask)
            mean = torch.einsum("btd,bt->bd", seen, mask.float()) / mask.sum(1, keepdim=True).clamp(min=1)
            return self.head(mean), {"shape": mean.shape[0] // 2, "name": None}

    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=32)
    module = Attention().eval()
    ids, mask = torch.randint(0, 50, (4, 7)), torch.ones(4, 7, dtype=torch.bool)
    shapes = ({0: rows, 1: length}, {0: rows, 1: length})
    torch.export.save(torch.export.export(module, (ids, mask), dynamic_shapes=shapes), tmp_path / "a.pt2")
    found = load_program(tmp_path / "a.pt2", "teacher.model").module()(ids, mask)[0]
    np.testing.assert_allclose(found.detach().numpy(), module(ids, mask)[0].detach().numpy(), rtol=1e-5, atol=1e-6)

    conv = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding="same"), torch.nn.BatchNorm2d(8), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    torch.export.save(torch.export.export(conv, (x,), dynamic_shapes=({0: rows},)), tmp_path / "c.pt2")
    program = load_program(tmp_path / "c.pt2", "teacher.model")
    assert training_operator(program) is None
    np.testing.assert_allclose(program.module()(x).detach().numpy(), conv(x).detach().numpy(), rtol=1e-4, atol=1e-6)


def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "training.pt2", Net(training_parts=True).train())
    with pytest.raises(
        ValueError, match=r"was exported in training mode: its aten.dropout.default .*call model.eval\(\)"
    ):
        load_teacher({"kind": "torch", "model": str(path), "input": INPUT})
