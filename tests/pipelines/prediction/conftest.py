from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problem import CLASSES, FEATURES

from distilbeam.student.checkpoint import save_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A student of the problem that every end-to-end test has: each class's own feature is its logit."""
    config = StudentConfig(kind="mlp", hidden=(), input={"columns": ["x"]})
    network = build_student(config, (FEATURES,), CLASSES)
    weight, bias = network.parameters()
    with torch.no_grad():
        weight.copy_(torch.eye(CLASSES, FEATURES))
        bias.zero_()
    return save_student(tmp_path / "student", network, config, [str(c) for c in range(CLASSES)], (FEATURES,))


@pytest.fixture
def text_student(tmp_path: Path) -> Path:
    """A student of texts with random weights."""
    config = StudentConfig(kind="mlp", hidden=(), input={"kind": "text", "columns": ["text"], "buckets": 64})
    torch.manual_seed(0)
    return save_student(tmp_path / "texts", build_student(config, (64,), 2), config, ["no", "yes"], (64,))


@pytest.fixture
def image_student(tmp_path: Path) -> Path:
    """A student of images of 8 x 8 grey pixels that says `light` where they are lighter than the middle."""
    reading = {"kind": "image", "columns": ["image"], "mode": "L", "size": [8, 8]}
    config = StudentConfig(kind="mlp", hidden=(), input=reading)
    network = build_student(config, (1, 8, 8), 2)
    weight, bias = network.parameters()
    with torch.no_grad():
        weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 64))
        bias.copy_(torch.tensor([32.0, -32.0]))
    return save_student(tmp_path / "images-student", network, config, ["dark", "light"], (1, 8, 8))
