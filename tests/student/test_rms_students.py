"""Students with RMS norms in front: against the same network in plain torch, with their 8-bit rows, exported."""

from __future__ import annotations

import pytest
import torch
from small_steps import CLASSES, CPU, NUMBERS, TOKENS, config_of, rows_of
from torch import nn

from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.kernels.quantize.formats import QuantizedRows
from distilbeam.student.networks.build import build_student
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.wrap import make_network

MLP = {"kind": "mlp", "hidden": (16, 16, 16), "norm": "rms", "input": NUMBERS}
TRANSFORMER = {"kind": "transformer", "dim": 16, "heads": 2, "layers": 2, "norm": "rms", "input": TOKENS}
NETWORKS = [
    ({**network, "residual": residual}, shape)
    for network, shape in ((MLP, (5,)), (TRANSFORMER, (8,)))
    for residual in ("none", "plain", "laurel-rw+lr", "laurel-rw+lr+pa")
]


def name_of(value):
    return f"{value['kind']}-{value['residual']}" if isinstance(value, dict) else ""


def rms(norm, x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * norm.weight


def joined(residual, update, x, earlier):
    """The learned augmented residual, written out; arXiv:2411.07501, section 2."""
    if not hasattr(residual, "variant"):
        return update
    alpha, beta = (1, 1) if residual.balance is None else 2 * residual.balance.softmax(0)
    mapped = x if residual.down is None else x + (x @ residual.down) @ residual.up
    total = alpha * update + beta * mapped
    if residual.gamma is not None:
        total = total + sum(g * p for g, p in zip(residual.gamma, earlier, strict=False))
    return total


def plain_mlp(network, x):
    h = read = x
    earlier = []
    for layer, norm, residual, keeps in zip(
        network.layers, network.norms, network.residuals, network.keeps, strict=True
    ):
        update = torch.relu(layer(read))
        earlier, h = ([h, *earlier], joined(residual, update, h, earlier)) if keeps else ([], update)
        read = rms(norm, h)
    return network.head(read)


def plain_transformer(network, ids):
    there = ids != network.pad_id
    h, earlier = network.tokens(ids) + network.positions, []
    for sublayer, norm, residual in zip(network.sublayers, network.norms, network.residuals, strict=True):
        update = sublayer(rms(norm, h), there)
        earlier, h = [h, *earlier], joined(residual, update, h, earlier)
    shares = there / there.sum(1, keepdim=True)
    return network.head((rms(network.norm, h) * shares[..., None]).sum(1))


def moved_away_from_the_start(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(("student", "shape"), NETWORKS, ids=name_of)
def test_networks_are_what_plain_torch_makes_of_them(student, shape):
    torch.manual_seed(0)
    network = moved_away_from_the_start(build_student(config_of(student), shape, CLASSES)).double()
    inputs = rows_of(shape, "dense")[0].inputs()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    expected = (plain_mlp if student["kind"] == "mlp" else plain_transformer)(network, inputs)
    found = network(inputs)
    torch.testing.assert_close(found, expected)
    above = torch.randn(found.shape, dtype=torch.float64)
    parameters = list(network.parameters())
    slopes, true = (torch.autograd.grad(y, parameters, above, allow_unused=True) for y in (found, expected))
    for slope, best in zip(slopes, true, strict=True):
        torch.testing.assert_close(slope, best)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("student", [MLP, TRANSFORMER], ids=lambda student: student["kind"])
def test_layers_in_eight_bits_read_rows_that_the_residual_made(student, precision, monkeypatch):
    torch.manual_seed(0)
    shape = (5,) if student["kind"] == "mlp" else (8,)
    config, (rows, spec) = config_of({**student, "residual": "laurel-rw"}), rows_of(shape, "top_k")
    module = build_student(config, shape, CLASSES)
    training = TrainConfig(precision=precision, precision_gate="sizes")
    network = make_network(module, config, training, Processes(CPU), spec)
    read = []
    forward = LowPrecisionLinear.forward

    def watched(self, given):
        read.append(type(given))
        return forward(self, given)

    monkeypatch.setattr(LowPrecisionLinear, "forward", watched)
    step_loss(network, training, rows, spec, None, None, CPU).backward()
    # mlp: the second layer reads a norm without a residual, the third what a residual made; transformer: the first
    # sublayer reads the embedding's norm, the layers within a sublayer its own numbers
    assert read.count(QuantizedRows) == (1 if student["kind"] == "mlp" else 3)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("student", [MLP, TRANSFORMER, {**MLP, "norm": "own"}, {**TRANSFORMER, "norm": "own"}], ids=str)
def test_autocast_does_not_narrow_the_residual_stream(student, monkeypatch):
    from distilbeam.student.networks.laurel import LaurelResidual

    shape = (5,) if student["kind"] == "mlp" else (8,)
    module = build_student(config_of({**student, "residual": "laurel-rw"}), shape, CLASSES)
    seen = []
    for name in ("forward", "normed"):
        original = getattr(LaurelResidual, name)

        def watched(self, *arguments, original=original):
            made = original(self, *arguments)
            total = made[0] if isinstance(made, tuple) else made
            seen.append((arguments[0].dtype, arguments[1].dtype, total.dtype))
            return made

        monkeypatch.setattr(LaurelResidual, name, watched)
    with torch.autocast("cpu", torch.bfloat16):
        module(rows_of(shape, "dense")[0].inputs())
    assert seen
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_a_network_that_has_no_such_norms_refuses_them():
    with pytest.raises(ValueError, match=r"norm 'rms' is for the kinds mlp, text, transformer, got kind 'resnet'"):
        config_of({"kind": "resnet", "norm": "rms", "input": NUMBERS})


@pytest.mark.parametrize(("student", "shape"), NETWORKS[2::4], ids=name_of)
def test_exports_give_the_same_logits(student, shape):
    network = moved_away_from_the_start(build_student(config_of(student), shape, CLASSES)).eval()
    inputs = rows_of(shape, "dense")[0].inputs()
    program = torch.export.export(network, (inputs,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(program.module()(inputs[:5]), network(inputs[:5]))
    assert isinstance(network.last_layer(), nn.Linear)


def test_pruning_refuses_norms_that_it_cannot_follow():
    from distilbeam.student.export.prune import require_prunable

    with pytest.raises(ValueError, match="pruning cannot follow channels through norm 'rms'; choose norm 'own'"):
        require_prunable(build_student(config_of({**MLP, "residual": "plain"}), (5,), CLASSES))
