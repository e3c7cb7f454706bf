"""PyTorch teachers: programs, factories, devices, fingerprints, memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from distilbeam.teacher import Teacher, TeacherChanged, ask, load_teacher
from distilbeam.teacher.backends.local import select_output
from distilbeam.teacher.oom_backoff import Halving

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=6, form="tensor"):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 3))
        self.form = form
        self.largest = None  # rows that fit into the pretended memory
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        if self.largest is not None and len(x) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        logits = self.layers(x)
        return {"tensor": logits, "tuple": (x, logits), "dict": {"hidden": x, "logits": logits}}[self.form]

def not_a_module():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    import nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    return nets.Net().eval()


X = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
BATCH = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
INPUT = {"column": "x"}


def expected(net: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = net(torch.tensor(X)).numpy()
    return answer


def exported(net: Any, path: Path, rows: int | None = None) -> Path:
    shapes = None if rows else ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(net.layers, (torch.zeros(rows or 2, 4),), dynamic_shapes=shapes), path)
    return path


def teacher(folder: Path, **settings: Any) -> Any:
    return load_teacher({"kind": "torch", "model": "nets:Net", "input": INPUT, **settings}, base=folder)


def test_exported_program_answers_like_the_module(factory: Any, tmp_path: Path) -> None:
    exported(factory, tmp_path / "net.pt2")
    loaded = load_teacher({"kind": "torch", "model": "net.pt2", "input": INPUT}, base=tmp_path)
    assert isinstance(loaded, Teacher)
    answer = loaded.logits(BATCH)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, expected(factory), rtol=1e-6)
    assert loaded.logits(BATCH.slice(0, 0)).shape == (0, 3)


def test_program_of_one_batch_size_answers_any_number_of_rows(factory: Any, tmp_path: Path) -> None:
    path = exported(factory, tmp_path / "net.pt2", rows=8)
    loaded = load_teacher({"kind": "torch", "model": str(path), "input": INPUT})
    for rows in (23, 8, 1):
        np.testing.assert_allclose(loaded.logits(BATCH.slice(0, rows)), expected(factory)[:rows], rtol=1e-6)


@pytest.mark.parametrize("form", ["safetensors", "state dict"])
def test_factory_with_weights_is_in_evaluation_mode(factory: Any, tmp_path: Path, form: str) -> None:
    name = "w.safetensors" if form == "safetensors" else "w.pt"
    (save_file if form == "safetensors" else torch.save)(factory.state_dict(), tmp_path / name)
    loaded = teacher(tmp_path, weights=name)
    np.testing.assert_allclose(loaded.logits(BATCH), expected(factory), rtol=1e-6)


def test_pickled_modules_are_refused(factory: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path(tmp_path / "executed").touch, ()

    (tmp_path / "w.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"w.pt is not a state dict of tensors only, which is all that is loaded"):
        teacher(tmp_path, weights="w.pt")
    torch.save(factory, tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"save module.state_dict\(\) with torch.save, or use safetensors"):
        teacher(tmp_path, weights="module.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_close_and_has_its_own_fingerprint(factory: Any, tmp_path: Path, dtype: str) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    low, full = teacher(tmp_path, weights="w.safetensors", dtype=dtype), teacher(tmp_path, weights="w.safetensors")
    np.testing.assert_allclose(low.logits(BATCH), expected(factory), atol=0.03)
    assert np.abs(low.logits(BATCH) - expected(factory)).max() > 0
    assert low.fingerprint() != full.fingerprint()


@pytest.mark.parametrize(("form", "output"), [("tuple", 1), ("dict", None), ("dict", "logits")])
def test_logits_are_found_among_outputs(factory: Any, tmp_path: Path, form: str, output: Any) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    loaded = teacher(tmp_path, weights="w.safetensors", arguments={"form": form}, output=output)
    np.testing.assert_allclose(loaded.logits(BATCH), expected(factory), rtol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "output", "message"),
    [
        ({"a": 1, "b": 2}, None, "teacher.output must be one of the model's outputs a, b, got 'logits'"),
        ({"a": 1}, "b", "teacher.output must be one of the model's outputs a, got 'b'"),
        ((1, 2), 2, "teacher.output must be a position below 2, got 2"),
        ((1, 2), "a", "teacher.output must be a position below 2, got 'a'"),
    ],
)
def test_wrong_outputs_are_sentences(outputs: Any, output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        select_output(outputs, output)


def test_the_only_output_needs_no_name() -> None:
    assert select_output({"scores": 5}, None) == 5
    assert select_output((7, 8), None) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no.pt2"}, r"the teacher's file .*no.pt2 does not exist; relative paths start at"),
        ({"weights": "no.safetensors"}, r"the teacher's file .*no.safetensors does not exist"),
        (
            {"model": "net.pt2", "weights": "w"},
            "weights and arguments must be left out for a .pt2 program, which contains",
        ),
        ({"model": "nets:Nut"}, "teacher.model: module 'nets' has no 'Nut'"),
        ({"model": "nets"}, "teacher.model must be 'module:name', got 'nets'"),
        ({"model": "nets:not_a_module"}, "teacher.model: nets:not_a_module must return a torch module, got int"),
        ({"device": "gpu"}, "teacher.device must be cpu, cuda, cuda:N, tpu or auto, got 'gpu'"),
        ({"weights": "w.safetensors", "arguments": {"width": 7}}, "w.safetensors does not fit nets:Net: "),
        ({"modle": "x"}, "teacher.modle is not a setting; did you mean teacher.model"),
    ],
)
def test_wrong_settings_are_sentences(factory: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        teacher(tmp_path, **settings)


@pytest.mark.parametrize("cut", [slice(0, 3000), slice(100, None)], ids=["end", "beginning"])
def test_a_damaged_program_is_a_sentence(tmp_path: Path, cut: slice) -> None:
    program = torch.export.export(torch.nn.Linear(6, 3).eval(), (torch.zeros(2, 6),))
    torch.export.save(program, tmp_path / "whole.pt2")
    data = (tmp_path / "whole.pt2").read_bytes()
    (tmp_path / "net.pt2").write_bytes(data[cut] if cut.start == 0 else b"\0" * cut.start + data[cut])
    with pytest.raises(
        ValueError, match=r"net.pt2 is not a torch.export program: it is damaged or cut off; copy or ex"
    ):
        load_teacher({"kind": "torch", "model": "net.pt2", "input": {"columns": ["x"]}}, base=tmp_path)


def test_a_file_that_is_no_program_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"not a program")
    with pytest.raises(ValueError, match=r"teacher.model: .*net.pt2 is not a torch.export program"):
        load_teacher({"kind": "torch", "model": "net.pt2", "input": INPUT}, base=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.usefixtures("factory")
def test_cuda_without_a_device_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda was asked for, but this machine has no CUDA device; use auto or cpu"):
        teacher(tmp_path, device="cuda")


@pytest.mark.usefixtures("factory")
def test_tpu_without_its_library_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher.device: tpu needs torch_xla; install torch_xla\[tpu\]"):
        teacher(tmp_path, device="tpu")


def test_fingerprint_follows_what_decides_the_answers(factory: Any, tmp_path: Path) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    settings: dict[str, Any] = {"weights": "w.safetensors"}
    base = teacher(tmp_path, **settings).fingerprint()
    assert base.startswith("torch:nets:Net:")
    assert teacher(tmp_path, **settings, batch_rows=5, device="cpu").fingerprint() == base
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes())
    assert teacher(tmp_path / "elsewhere", **settings).fingerprint() == base
    changed = [
        teacher(tmp_path, **settings, input={"column": "x", "scale": 2.0}).fingerprint(),
        teacher(tmp_path, **settings, arguments={"form": "dict"}).fingerprint(),
        teacher(tmp_path).fingerprint(),
    ]
    save_file({k: v + 1 for k, v in factory.state_dict().items()}, tmp_path / "w.safetensors")
    changed.append(teacher(tmp_path, **settings).fingerprint())
    (tmp_path / "nets.py").write_text(FACTORY + "\n# another line\n")
    changed.append(teacher(tmp_path, **settings).fingerprint())
    assert len({base, *changed}) == 6


def test_a_teacher_that_changes_in_the_middle_stops_the_job(factory: Any, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(factory.state_dict(), weights)
    loaded = teacher(tmp_path, weights="w.safetensors")
    before = loaded.fingerprint()
    weights.touch()  # another time, the same content
    assert loaded.fingerprint() == before
    save_file({k: v + 1 for k, v in factory.state_dict().items()}, weights)
    with pytest.raises(
        TeacherChanged, match=r"the teacher changed while it was being asked: .*w.safetensors.* had the hash"
    ):
        loaded.fingerprint()


def test_memory_that_runs_out_halves_the_batch_for_good(factory: Any, tmp_path: Path) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    loaded = teacher(tmp_path, weights="w.safetensors")
    net = loaded._model
    net.largest = 3
    np.testing.assert_allclose(loaded.logits(BATCH), expected(factory), rtol=1e-6)
    assert net.seen == [23, 11, 5, 2, *[2] * 10, 1]
    net.seen.clear()
    loaded.logits(BATCH)
    assert net.seen == [*[2] * 11, 1]  # the size that fitted is remembered


@pytest.mark.usefixtures("factory")
def test_batch_rows_bounds_the_forward_pass(tmp_path: Path) -> None:
    loaded = teacher(tmp_path, batch_rows=10)
    loaded.logits(BATCH)
    assert loaded._model.seen == [10, 10, 3]


def test_a_row_that_never_fits_is_an_error_of_that_row() -> None:
    sizes: list[int] = []

    def run(rows: np.ndarray) -> np.ndarray:
        sizes.append(len(rows))
        raise MemoryError

    with pytest.raises(MemoryError):
        Halving(run, lambda e: isinstance(e, MemoryError), lambda: None)(np.zeros((4, 1)))
    assert sizes == [4, 2, 1]


@pytest.mark.usefixtures("factory")
def test_other_errors_are_not_taken_for_memory(tmp_path: Path) -> None:
    loaded = teacher(tmp_path)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        loaded.logits(pa.record_batch({"x": [[1.0, 2.0]] * 4}))
    assert loaded._model.seen == [4]


@pytest.mark.usefixtures("factory")
def test_a_closed_teacher_says_so(tmp_path: Path) -> None:
    loaded = teacher(tmp_path)
    loaded.close()
    loaded.close()
    with pytest.raises(RuntimeError, match="the teacher was closed; load it again"):
        loaded.logits(BATCH)


@pytest.mark.usefixtures("factory")
def test_teachers_are_not_pickled(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="teachers are not pickled; send the configuration and load the teacher where it is"
    ):
        pickle.dumps(teacher(tmp_path))


@pytest.mark.slow
def test_a_beam_worker_makes_and_closes_its_teacher(factory: Any, tmp_path: Path) -> None:
    exported(factory, tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "expected.npy", expected(factory))
    code = """
import numpy as np, pyarrow as pa
import apache_beam as beam
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that
from distilbeam.teacher import ask, load_teacher

class Label(beam.DoFn):
    def __init__(self, config):
        self.config = config
    def setup(self):
        self.teacher = load_teacher(self.config)
    def process(self, rows):
        yield ask(self.teacher, pa.record_batch({"x": rows.tolist()}), 3, batch_size=4).logits
    def teardown(self):
        self.teacher.close()

def equal(found):
    logits = np.concatenate(sorted(found, key=len, reverse=True))
    np.testing.assert_allclose(logits, np.load("expected.npy"), rtol=1e-5, atol=1e-6)

x = np.load("x.npy")
with beam.Pipeline(FnApiRunner()) as p:
    labels = p | beam.Create([x[:14], x[14:]]) | beam.Reshuffle() | beam.ParDo(
        Label({"kind": "torch", "model": "net.pt2", "input": {"column": "x"}, "device": "cpu"}))
    assert_that(labels, equal)
print("equal")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("equal\n")


def test_asking_a_real_teacher_with_bad_rows(factory: Any, tmp_path: Path) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    x = X.copy()
    x[4, 1] = np.nan
    rows = pa.record_batch({"x": pa.array([*x[:9].tolist(), [1.0], *x[10:].tolist()], pa.list_(pa.float32()))})
    answers = ask(teacher(tmp_path, weights="w.safetensors"), rows, 3, batch_size=8)
    assert [(e.row, e.stage) for e in answers.errors] == [(4, "answer"), (9, "teacher")]
    good = np.flatnonzero(answers.ok)
    np.testing.assert_allclose(answers.logits[good], expected(factory)[good], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_memory_that_runs_out_halves_the_batch(factory: Any, tmp_path: Path) -> None:
    save_file(factory.state_dict(), tmp_path / "w.safetensors")
    loaded: Any = teacher(tmp_path, weights="w.safetensors", device="cuda")
    forward: Callable[..., Any] = loaded._model.forward

    def hungry(x: torch.Tensor) -> torch.Tensor:
        free, _ = torch.cuda.mem_get_info()
        torch.empty(int(free * len(x) / 6), dtype=torch.uint8, device="cuda")  # fits for five rows and fewer
        answer: torch.Tensor = forward(x)
        return answer

    loaded._model.forward = hungry
    np.testing.assert_allclose(loaded.logits(BATCH), expected(factory), rtol=1e-3, atol=1e-4)
    assert loaded._forward.rows == 5
