"""The preprocessing in an export's graph: raw numbers and raw pixels get the student's answers, in every format."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import FORMATS, export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.export.preprocessing import FAR, graph_input
from distilbeam.student.export.runtimes import open_runner
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.programs import load_program

SIZE = (12, 16)
CLASSES = ("low", "middle", "high")
SCALING = {"mean": [0.4, 0.5, 0.3], "std": [0.2, 0.3, 0.25]}


def made(where, inputs, shape, kind="cnn"):
    config = StudentConfig(kind=kind, width=0.25, hidden=(8,), input=inputs)
    torch.manual_seed(0)
    network = build_student(config, shape, 3)
    for parameter in network.parameters():  # logits of a size at which an unscaled input would show
        parameter.requires_grad_(requires_grad=False).mul_(2.0)
    return save_student(where, network, config, CLASSES, shape)


def pngs(sizes, seed=0):
    rng = np.random.default_rng(seed)
    files = []
    for height, width in sizes:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("layout", ["chw", "hwc"])
@pytest.mark.parametrize("format_", FORMATS)
def test_raw_pixels_get_the_answers_of_the_student(tmp_path, format_, layout):
    shape = (3, *SIZE) if layout == "chw" else (*SIZE, 3)
    kind = "cnn" if layout == "chw" else "mlp"
    inputs = {"kind": "image", "columns": ["image"], "size": SIZE, "layout": layout, **SCALING}
    folder = made(tmp_path / "s", inputs, shape, kind)
    student, files = load_student(folder), pngs([(12, 16), (30, 40), (9, 9), (61, 17)] * 5)
    batch = pa.record_batch({"image": pa.array(files, pa.binary())})
    expected = student.logits(batch)
    folder = export_student(folder, format_, tmp_path / "e", student.inputs(batch))
    run, spread = open_runner(folder / f"model.{'pt2' if format_ == 'pt2' else 'onnx'}"), expected.std()
    bound = {"int8": 0.2, "int8-weights": 0.03}.get(format_, 0.01) * spread
    dtype = np.float32 if format_ == "pt2" else np.uint8
    found = np.concatenate([run(pixels(file)[None].astype(dtype)) for file in files])
    assert np.sqrt(np.mean((found - expected) ** 2)) <= bound  # a level of single pixels, and the rounding of weights
    together = run(np.stack([pixels(file) for file in files[::4]]).astype(dtype))  # of one size: as they are
    assert np.sqrt(np.mean((together - expected[::4]) ** 2)) <= bound
    if format_ in ("pt2", "onnx"):
        np.testing.assert_allclose(together, expected[::4], atol=1e-5 * spread)
        np.testing.assert_allclose(load_export(folder).logits(batch), expected, atol=1e-5 * spread)  # resized by Pillow


@pytest.mark.parametrize("size", [(12, 16), (30, 40), (7, 5), (100, 3)])
def test_resizing_is_pillows_but_for_a_level_of_single_pixels(tmp_path, size):
    student = load_student(made(tmp_path / "s", {"kind": "image", "columns": ["image"], "size": SIZE}, (3, *SIZE)))
    module = graph_input(student).module
    module.network = torch.nn.Identity()
    file = pngs([size])[0]
    resized = np.asarray(Image.open(io.BytesIO(file)).resize(SIZE[::-1], Image.Resampling.BILINEAR), np.float64)
    found = module(torch.from_numpy(pixels(file).copy())[None])[0].permute(1, 2, 0).numpy() * 255.0
    difference = np.abs(found - resized)
    assert difference.max() < 1.01
    assert (difference > 0.01).mean() <= 0.06


@pytest.mark.parametrize("format_", ["pt2", "onnx"])
def test_raw_numbers_get_the_answers_of_the_student(tmp_path, format_):
    inputs = {"columns": ["a", "b"], "scale": 0.5, "mean": [3.0, -40.0], "std": [2.0, 9.0]}
    folder = made(tmp_path / "s", inputs, (2,), "mlp")
    rng = np.random.default_rng(0)
    raw = (rng.normal(size=(200, 2)) * [4, 18] + [6, -80]).astype(np.float32)
    batch = pa.record_batch({"a": raw[:, 0], "b": raw[:, 1]})
    student = load_student(folder)
    folder = export_student(folder, format_, tmp_path / "e", student.inputs(batch))
    export = load_export(folder)
    np.testing.assert_allclose(export._run(raw), student.logits(batch), atol=1e-5)
    np.testing.assert_allclose(export.logits(batch), student.logits(batch), atol=1e-5)
    description = json.loads((folder / "export.json").read_text())
    assert description["input"] == {"columns": ["a", "b"]}
    teacher = load_teacher(description["teacher"], base=folder, classes=CLASSES)
    np.testing.assert_allclose(teacher.logits(batch), student.logits(batch), atol=1e-5)
    teacher.close()


def test_a_mean_for_each_number_of_an_example_of_several_dimensions(tmp_path):
    mean = [float(i) for i in range(12)]
    folder = made(tmp_path / "s", {"columns": ["x"], "shape": [3, 2, 2], "mean": mean, "std": [2.0]}, (3, 2, 2), "mlp")
    student = load_student(folder)
    raw = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32) + np.array(mean, np.float32)
    batch = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(raw.reshape(-1)), 12)})
    export = load_export(export_student(folder, "onnx", tmp_path / "e"))
    np.testing.assert_allclose(export._run(raw.reshape(9, 3, 2, 2)), student.logits(batch), atol=1e-5)


def test_numbers_that_float32_would_coarsen_are_scaled_outside(tmp_path):
    inputs = {"columns": ["t"], "mean": [1.7e9], "std": [1.1 * 1.7e9 / FAR]}
    folder = made(tmp_path / "s", inputs, (1,), "mlp")
    student = load_student(folder)
    batch = pa.record_batch({"t": 1.7e9 + 1e6 * np.random.default_rng(0).normal(size=50)})
    export = load_export(export_student(folder, "onnx", tmp_path / "e"))
    assert export.description["graph"] != []
    inputs["std"] = [0.9 * 1.7e9 / FAR]
    folder = made(tmp_path / "far", inputs, (1,), "mlp")
    student = load_student(folder)
    export = load_export(export_student(folder, "onnx", tmp_path / "f"))
    assert export.description["graph"] == []
    assert export.description["input"]["mean"] == [1.7e9]
    np.testing.assert_allclose(export.logits(batch), student.logits(batch), atol=1e-5)


def test_what_the_middle_is_cut_out_of_stays_outside(tmp_path):
    inputs = {"kind": "image", "columns": ["image"], "size": SIZE, "resize": "crop"}
    folder = made(tmp_path / "s", inputs, (3, *SIZE))
    export = load_export(export_student(folder, "onnx", tmp_path / "e"))
    assert export.description["dimensions"] == ["batch"]
    batch = pa.record_batch({"image": pa.array(pngs([(30, 31), (50, 20)]), pa.binary())})
    np.testing.assert_allclose(export.logits(batch), load_student(folder).logits(batch), atol=1e-5)


@pytest.mark.parametrize("format_", ["onnx", "int8", "int8-weights"])
def test_an_onnx_file_says_what_it_is(tmp_path, format_):
    import onnxruntime

    folder = made(tmp_path / "s", {"kind": "image", "columns": ["image"], "size": SIZE, **SCALING}, (3, *SIZE))
    student = load_student(folder)
    examples = np.random.default_rng(0).normal(size=(32, 3, *SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(export_student(folder, format_, tmp_path / "e", examples) / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_outputs()[0].shape == ["batch", 3]
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list(CLASSES)
    assert json.loads(said["dimensions"]) == ["batch", "height", "width"]
    assert json.loads(said["input"])["layout"] == "hwc"
    assert said["input_dtype"] == "uint8"
    assert said["student"] == student.fingerprint()
    assert json.loads(said["parameters"]) == student.num_parameters
    assert json.loads(said["weights_bytes"]) == student.size_bytes
    assert json.loads(said["packages"])["torch"] == torch.__version__


def test_a_program_says_what_it_is(tmp_path):
    folder = made(tmp_path / "s", {"kind": "image", "columns": ["image"], "size": SIZE}, (3, *SIZE))
    file = export_student(folder, "pt2", tmp_path / "e") / "model.pt2"
    said = {"distilbeam.json": ""}
    torch.export.load(file, extra_files=said)
    about = json.loads(said["distilbeam.json"])
    assert about["classes"] == list(CLASSES)
    assert about["graph"][0] == "images are resized to 12 x 16"
    load_program(file, "teacher.model")  # by the reader that trusts nobody


def test_an_export_that_leaves_the_scaling_to_its_callers_is_read_as_before(tmp_path):
    folder = made(tmp_path / "s", {"kind": "image", "columns": ["image"], "size": SIZE, **SCALING}, (3, *SIZE))
    student = load_student(folder)
    batch = pa.record_batch({"image": pa.array(pngs([(20, 20), (5, 9)]), pa.binary())})
    export = export_student(folder, "pt2", tmp_path / "e")
    program = torch.export.export(student.module, (student.zeros(2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, export / "model.pt2")
    description = json.loads((export / "export.json").read_text())
    former = {
        name: description[name] for name in ("format_version", "format", "file", "size_bytes", "classes", "student")
    }
    digest = hashlib.blake2b((export / "model.pt2").read_bytes(), digest_size=16).hexdigest()
    own = student.config.input.model_dump(mode="json", exclude_defaults=True)
    former |= {"input": own, "input_shape": [3, *SIZE], "input_dtype": "float32", "digest": digest}
    (export / "export.json").write_text(json.dumps(former))
    expected = student.logits(batch)
    np.testing.assert_allclose(load_export(export).logits(batch), expected, atol=1e-5 * np.abs(expected).max())
