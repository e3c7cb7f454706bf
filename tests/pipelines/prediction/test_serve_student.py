"""A served student: TensorFlow Serving's protocol, the classes by name, and the limits of a served teacher."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from problem import make_table

from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.prediction.serve_student import StudentServer
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.serve import ModelServer, ServeOptions, TeacherServer
from distilbeam.teacher.tfserving.tensors import to_array, to_proto

PREDICT = "/tensorflow.serving.PredictionService/Predict"


def ask(address: str, inputs: dict[str, Any], outputs: tuple[str, ...] = (), name: str = "student") -> dict[str, Any]:
    messages = load_messages()
    request = messages.predict.PredictRequest(output_filter=list(outputs))
    request.model_spec.name = name
    for column, values in inputs.items():
        request.inputs[column].CopyFrom(to_proto(np.asarray(values)))
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            PREDICT, lambda m: m.SerializeToString(), messages.predict.PredictResponse.FromString
        )
        response = call(request, timeout=30)
    return {output: to_array(value) for output, value in response.outputs.items()}


def test_a_student_answers_with_logits_and_the_names_of_its_classes(student: Path) -> None:
    table = make_table(40, 5, labelled=False)
    expected = load_student(student).predict(table, logits=True)
    x = np.array(table["x"].to_pylist(), np.float32)
    with StudentServer(open_model(student)[1]) as server:
        assert server.fingerprint == load_student(student).fingerprint()
        found = ask(server.address, {"x": x})
        assert set(found) == {"logits", "prediction", "confidence"}
        assert [name.decode() for name in found["prediction"]] == expected["prediction"].to_pylist()
        np.testing.assert_allclose(found["confidence"], expected["confidence"].to_numpy(), atol=1e-6)
        np.testing.assert_allclose(found["logits"], np.array(expected["logits"].to_pylist()), atol=1e-5)
        assert set(ask(server.address, {"x": x}, ("prediction",))) == {"prediction"}
        # and whoever asks a served teacher can ask it
        section = {"kind": "tfserving", "address": server.address, "model": "student", "input": {"columns": ["x"]}}
        teacher = load_teacher(section)
        batch = table.select(["x"]).combine_chunks().to_batches()[0]
        np.testing.assert_allclose(teacher.logits(batch), found["logits"], atol=1e-6)
        teacher.close()


def test_top_k_keeps_the_names(student: Path) -> None:
    x = np.eye(4, dtype=np.float32)
    with StudentServer(open_model(student)[1], options=ServeOptions(name="s", top_k=2)) as server:
        found = ask(server.address, {"x": x}, name="s")
    expected = load_student(student).predict({"x": list(x)}, top_k=2)
    assert found["top_k_classes"].astype(str).tolist() == expected["top_classes"].to_pylist()
    assert [name.decode() for name in found["prediction"]] == expected["prediction"].to_pylist()


def test_texts(text_student: Path) -> None:
    texts = ["yes", "where is it", ""]
    with StudentServer(open_model(text_student)[1]) as server:
        found = ask(server.address, {"text": np.array([t.encode() for t in texts], object)})
    assert [name.decode() for name in found["prediction"]] == load_student(text_student).predict(texts)[
        "prediction"
    ].to_pylist()


def test_what_is_refused(student: Path) -> None:
    with pytest.raises(
        ValueError, match=r"host 0\.0\.0\.0 is reached from other machines, and nothing would be encrypted"
    ):
        StudentServer(open_model(student)[1], options=ServeOptions(host="0.0.0.0"))
    assert issubclass(StudentServer, ModelServer)
    assert issubclass(TeacherServer, ModelServer)  # one server, with its limits
    with StudentServer(open_model(student)[1], options=ServeOptions(name="student", max_rows=3)) as server:
        for inputs, why in [
            ({"x": np.zeros((4, 4), np.float32)}, "a request must have at most 3 rows here, got 4"),
            (
                {"x": np.zeros((2, 5), np.float32)},
                r"must have the shape \[4\] that the student was trained on, got \[5\]",
            ),
            ({"y": np.zeros((2, 4), np.float32)}, "the inputs must be x, got y"),
        ]:
            with pytest.raises(grpc.RpcError, match=why) as caught:
                ask(server.address, inputs)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        found = ask(server.address, {"x": np.array([[0, 0, 9, 0], [np.nan, 0, 0, 0]], np.float32)})
        assert found["prediction"].tolist() == [b"2", b""]  # no distribution, no class
        assert np.isnan(found["confidence"][1])


def test_the_command_serves_until_it_is_interrupted(student: Path) -> None:
    words = [sys.executable, "-m", "distilbeam", "serve-student", str(student), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(120, process.kill)
    guard.start()
    assert process.stdout is not None
    line = ""
    while "Serving" not in line:
        line = process.stdout.readline()
        assert line or process.poll() is None
        time.sleep(0.01)
    address = line.split(" at ")[1].split(" as ")[0]
    assert ask(address, {"x": np.eye(4, dtype=np.float32)})["prediction"].tolist()[1:3] == [b"1", b"2"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    guard.cancel()
    process.stdout.close()
