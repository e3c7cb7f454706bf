"""The networks: their shapes, the Survey's parameter counts, residuals, and factories of one's own."""

from __future__ import annotations

import pydantic
import pytest
import torch

from distilbeam.student.networks.build import build_student, count_parameters
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.laurel import LaurelResidual
from distilbeam.student.training.config import TrainConfig

INPUT = {"columns": ["x"]}


@pytest.mark.parametrize(
    ("width", "total"),
    [(0.05, 14_713), (0.1, 26_044), (0.25, 98_570), (0.5, 350_058), (0.75, 764_874), (1.0, 1_343_018)],
)
def test_the_cnn_has_the_surveys_number_of_parameters(width, total):
    """The Survey's table counts the running statistics of the batch norms as well."""
    network = build_student(StudentConfig(kind="cnn", width=width, input=INPUT), (3, 32, 32), 10)
    statistics = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    assert count_parameters(network) + statistics == total
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("kind", "shape", "parameters"),
    [("linear", (4, 2), 8 * 5 + 5), ("mlp", (4, 2), 8 * 6 + 6 + 6 * 6 + 6 + 6 * 5 + 5)],
)
def test_small_networks(kind, shape, parameters):
    network = build_student(StudentConfig(kind=kind, hidden=(6, 6), input=INPUT), shape, 5)
    assert count_parameters(network) == parameters
    assert network(torch.zeros(3, *shape)).shape == (3, 5)


def test_residuals_join_layers_that_keep_their_width():
    config = StudentConfig(kind="mlp", hidden=(6, 6, 6, 4), residual="laurel-rw+lr+pa", rank=2, input=INPUT)
    network = build_student(config, (8,), 3)
    assert [isinstance(r, LaurelResidual) for r in network.residuals] == [False, True, True, False]
    assert [r.variant for r in network.residuals[1:3]] == ["rw+lr", "rw+lr+pa"]


def test_earlier_residuals_are_given_the_latest_first():
    config = StudentConfig(kind="mlp", hidden=(2, 2, 2, 2), residual="laurel-pa", previous=2, input=INPUT)
    network = build_student(config, (2,), 2)
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([1.0, 2.0]))
        network.residuals[3].gamma.copy_(torch.tensor([10.0, 100.0]))
        network.head.weight.copy_(torch.eye(2))
        network.head.bias.zero_()
    # h0 = b; h1 = b + h0 = 2b; h2 = b + h1 = 3b; h3 = b + h2 + 10 h1 + 100 h0 = 124b
    torch.testing.assert_close(network(torch.zeros(1, 2)).detach(), torch.tensor([[124.0, 248.0]]))


def test_a_factory_is_imported_and_called(monkeypatch, tmp_path):
    (tmp_path / "own_networks.py").write_text(
        "import torch\n"
        "def small(input_shape, num_classes, scale): return torch.nn.Linear(input_shape[0], num_classes * scale)\n"
        "def wrong(input_shape, num_classes): return 'network'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = build_student(StudentConfig(kind="own_networks:small", options={"scale": 2}, input=INPUT), (4,), 3)
    assert made.out_features == 6
    for kind, message in (
        ("own_networks:missing", "cannot be found"),
        ("no_such_module_here:small", "cannot be found: No module named"),
        ("own_networks:wrong", "must return a torch module, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            build_student(StudentConfig(kind=kind, input=INPUT), (4,), 3)


def test_images_too_small_for_the_cnn_are_refused():
    with pytest.raises(ValueError, match=r"at least 8 x 8 pixels, got \[1, 7, 9\]"):
        build_student(StudentConfig(kind="cnn", input=INPUT), (1, 7, 9), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "forest"},
            "kind must be one of linear, mlp, cnn, resnet, text, transformer, huggingface or module:factory, got .forest.",
        ),
        ({"kind": "not a module:f"}, "module:factory"),
        ({"hidden": (4, 0)}, r"hidden must hold positive widths, got \[4, 0\]"),
        ({"options": {"a": 1}}, "options are arguments of a module:factory, kind 'mlp' takes none"),
        ({"residual": "laurel"}, "Input should be 'none', 'plain'"),
        ({"colour": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        StudentConfig(input=INPUT, **settings)


def test_training_settings_are_checked():
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        TrainConfig(lr=0)
    with pytest.raises(
        pydantic.ValidationError, match="'distill', 'weighted', 'slam', 'slam\\+weighted', 'reverse_kl'"
    ):
        TrainConfig(objective="rad")
