"""Every kind of student trained in every precision, its last layer apart from the loss and together with it."""

from __future__ import annotations

import logging

import pytest
import torch
from small_steps import CLASSES, CPU, NUMBERS, TOKENS, config_of, rows_of

from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.student.networks.build import build_student
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.wrap import UpToLastLayer, make_network

LEARNED = {"residual": "laurel-rw+lr", "norm": "rms"}
STUDENTS = {  # with the layers that 8 bits take: all linear ones of 16 numbers and more but the last
    "linear": ({"kind": "linear", "input": NUMBERS}, (5,), 0),
    "mlp": ({"kind": "mlp", "hidden": (16, 16, 16), **LEARNED, "input": NUMBERS}, (5,), 2),
    "mlp without norms": ({"kind": "mlp", "hidden": (16, 16), "residual": "plain", "input": NUMBERS}, (5,), 1),
    "text": ({"kind": "text", "dim": 16, "hidden": (16, 16), **LEARNED, "input": TOKENS}, (8,), 2),
    "transformer": ({"kind": "transformer", "dim": 16, "heads": 2, "layers": 1, **LEARNED, "input": TOKENS}, (8,), 4),
    "cnn": ({"kind": "cnn", "width": 0.25, "input": NUMBERS}, (3, 8, 8), 1),
    "resnet": ({"kind": "resnet", "depth": 8, "width": 0.5, "input": NUMBERS}, (3, 8, 8), 0),
}
STEPS = 40


def trained(name, precision, last_layer):
    """Train on a few rows and give the loss of every step, and what plain layers gave their numbers in."""
    torch.manual_seed(0)
    student, shape, _ = STUDENTS[name]
    config, (rows, spec) = config_of(student), rows_of(shape, "top_k")
    module = build_student(config, shape, CLASSES)
    training = TrainConfig(precision=precision, precision_gate="sizes", last_layer=last_layer)
    network = make_network(module, config, training, Processes(CPU), spec)
    assert isinstance(network, UpToLastLayer) == (last_layer == "together")
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses, dtypes = [], set()
    for layer in module.modules():
        if type(layer) in (torch.nn.Linear, torch.nn.Conv2d):
            layer.register_forward_hook(lambda _, __, made: dtypes.add(made.dtype))
    for _ in range(STEPS):
        loss = step_loss(network, training, rows, spec, None, None, CPU)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
    return losses, dtypes


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("last_layer", ["apart", "together"])
@pytest.mark.parametrize("name", STUDENTS)
def test_each_trains_in_each_precision_as_in_float32(name, last_layer, precision, monkeypatch, caplog):
    plain, _ = trained(name, "fp32", "apart")
    ran = set()
    forward = LowPrecisionLinear.forward

    def watched(self, given):
        ran.add(self)
        return forward(self, given)

    monkeypatch.setattr(LowPrecisionLinear, "forward", watched)
    with caplog.at_level(logging.INFO, "distilbeam"):
        losses, dtypes = trained(name, precision, last_layer)
    learned = plain[0] - plain[-1]
    assert learned > 0.1 * plain[0]
    assert abs(losses[0] - plain[0]) < 0.1 * plain[0]
    assert abs(losses[-1] - plain[-1]) < 0.15 * learned
    # what is said is what ran
    assert dtypes <= {torch.bfloat16}
    assert dtypes or last_layer == "together"
    narrow = STUDENTS[name][2] if precision in ("fp8", "int8") else 0
    assert len(ran) == narrow
    line = next(m for m in reversed(caplog.messages) if m.startswith(f"precision {precision}: "))
    assert (f"{narrow} of " in line) == (narrow > 0)
    assert f"{'all other' if narrow else 'all'} matrix products in bfloat16" in line
    assert ("without logits" in line) == (last_layer == "together")
    table = [words for words in (m.split() for m in caplog.text.splitlines()) if "Linear" in words and "->" in words]
    assert {words[5] for words in table} <= {precision, "bfloat16"}
    assert sum(words[5] == precision for words in table) == narrow
