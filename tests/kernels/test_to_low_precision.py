"""to_low_precision: which layers run in what and why, one quantisation a step, and a student that is otherwise the same."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

from distilbeam.kernels import LowPrecisionPolicy, WeightCache, fp8_linear, quantize_rowwise, to_low_precision
from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.kernels.low_precision import shapes

BACKENDS = [
    "distilbeam",
    pytest.param(
        "torchao",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
            pytest.mark.filterwarnings("ignore"),
        ],
    ),
]


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 48, bias=False)])
        self.narrow, self.odd = nn.Linear(48, 8), nn.Linear(8, 17)
        self.head = nn.Linear(48, 16)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


@pytest.fixture
def student():
    torch.manual_seed(0)
    return Student()


def policy(dtype="fp8", **more):
    return LowPrecisionPolicy(dtype=dtype, gate="sizes", **more)


def test_every_layer_has_its_line_and_reason(student):
    report = to_low_precision(student, policy(skip=("blocks.1",)))
    assert report.converted == 1
    assert str(report).splitlines() == [
        "1 of 5 linear layers run in 8 bits",
        "layer     shape            runs in  why",
        "blocks.0  Linear 32 -> 64  fp8      converted by distilbeam",
        "blocks.1  Linear 64 -> 48  float32  the policy skips it",
        "narrow    Linear 48 -> 8   float32  smaller than 16 -> 16",
        "odd       Linear 8 -> 17   float32  smaller than 16 -> 16",
        "head      Linear 48 -> 16  float32  it gives the logits",
    ]
    assert [type(layer).__name__ for layer in student.blocks] == ["LowPrecisionLinear", "Linear"]


def test_sizes_that_tensor_cores_do_not_take_and_layers_that_are_not_torchs():
    class Other(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(40, 32), Other(32, 32), nn.Linear(32, 32))
    reasons = [layer.reason for layer in to_low_precision(module, policy(keep_last=False)).layers]
    assert reasons == [
        "inputs and outputs are not multiples of 16",
        "Other may compute something else than torch's Linear",
        "",
    ]


def test_a_module_without_linear_layers():
    assert str(to_low_precision(nn.ReLU(), policy())) == "0 of 0 linear layers run in 8 bits"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "gradients"), [("fp8", "bf16"), ("fp8", "fp8"), ("int8", "bf16")])
def test_a_converted_student_is_near_and_not_equal(student, backend, dtype, gradients):
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = student.blocks[0](x)
    above = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    expected = [plain, *torch.autograd.grad(plain, (x, student.blocks[0].weight), above)]
    weight, names = student.blocks[0].weight, list(student.state_dict())
    report = to_low_precision(student, policy(dtype, backend=backend, gradients=gradients))
    assert [layer.dtype for layer in report.layers[:2]] == [dtype, dtype]
    assert student.blocks[0].weight is weight
    assert list(student.state_dict()) == names
    y = student.blocks[0](x)
    found = [y, *torch.autograd.grad(y, (x, weight), above)]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() / b.norm() < {"fp8": 0.06, "int8": 0.02}[dtype]
    assert (y - plain).norm() / plain.norm() > 1e-3


def test_torchao_is_asked_for_where_it_is_not(student, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        NotImplementedError, match="backend 'torchao' needs the package torchao, which is not installed"
    ):
        to_low_precision(student, policy(backend="torchao"))


def test_the_weight_is_quantised_once_a_step_and_never_stale(student):
    to_low_precision(student, policy())
    layer, calls = student.blocks[0], []
    original = layer.cache.rows_of
    layer.cache.rows_of = lambda w, quantize: original(w, lambda v: calls.append(1) or quantize(v))
    x = torch.randn(4, 32)
    for fused in (True, False):  # a fused optimizer writes without autograd counting it
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, fused=fused)
        calls.clear()
        for _ in range(3):
            for _ in range(2):
                y = layer(x)
                assert torch.equal(y, fp8_linear(x, layer.weight, layer.bias))
                y.sum().backward()
            optimizer.step()
        assert len(calls) == 3
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), fp8_linear(x, layer.weight, layer.bias))
    student.load_state_dict({name: 3 * value for name, value in student.state_dict().items()})
    assert torch.equal(layer(x), fp8_linear(x, layer.weight, layer.bias))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler deprecates parts of itself
def test_a_compiled_student_learns_what_a_plain_one_does(student):
    to_low_precision(student, policy())
    plain = copy.deepcopy(student)
    networks = {torch.compile(student): student, plain: plain}
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.1, fused=True) for module in networks.values()]
    for _ in range(3):
        x = torch.randn(16, 32)
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_an_inference_left_serves_a_training():
    weight, cache = torch.randn(16, 16, requires_grad=True), WeightCache()
    x = torch.randn(3, 16, requires_grad=True)
    with torch.inference_mode():
        first = fp8_linear(x, weight, cache=cache)
    second = fp8_linear(x, weight, cache=cache)
    second.sum().backward()
    assert torch.equal(first, second)
    with torch.inference_mode():
        twice = 2 * weight
        assert torch.equal(fp8_linear(x, twice, cache=WeightCache()), 2 * first)
    weight.data.mul_(2)  # behind autograd's back
    assert torch.equal(fp8_linear(x, weight, cache=cache), second)
    cache.clear()
    assert torch.equal(fp8_linear(x, weight, cache=cache), 2 * second)


def test_copies_and_devices_have_their_own_rows(student):
    to_low_precision(student, policy())
    x = torch.randn(4, 32)
    student(x)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        twin.blocks[0].weight.zero_()
    assert torch.equal(twin.blocks[0](x), twin.blocks[0].bias.expand(4, 64))
    assert student.blocks[0](x).abs().max() > 0
    assert twin.blocks[0].cache is not student.blocks[0].cache
    half = student.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_under_autocast_a_layer_gives_what_torchs_would(student):
    to_low_precision(student, policy())
    with torch.autocast("cpu", torch.bfloat16):
        y = student.blocks[0](torch.randn(4, 32))
    assert y.dtype == torch.bfloat16
    assert "precision=fp8" in repr(student)
    assert not student.eval().blocks[0].training


def test_the_layer_stands_in_for_torchs():
    plain = nn.Linear(16, 32, bias=False).eval()
    layer = LowPrecisionLinear(plain, "int8", "bf16")
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert not layer.training
    x = torch.eye(16)
    rows = quantize_rowwise(plain.weight, torch.int8)
    torch.testing.assert_close(layer(x), (rows.values * rows.scale).T.contiguous())


def test_the_table_of_shapes(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert shapes.why_not("fp8", 1 << 20, 1 << 14, 1 << 14, cpu) == "no fp8 layer is known to pay on cpu"
    assert shapes.why_not("int8", 1 << 20, 1 << 14, 1 << 14, cuda) == "no int8 layer is known to pay on cuda"
    monkeypatch.setitem(shapes.SMALLEST, "fp8", {"cuda": shapes.Shape(4096, 4096, 4096)})
    assert shapes.why_not("fp8", 4096, 4096, 4096, cuda) is None
    assert shapes.why_not("fp8", 1024, 2048, 1024, cuda) == (
        "1,024 x 2,048 x 1,024 is below 4,096 x 4,096 x 4,096, from where 8 bits pay"
    )


def test_by_the_table_nothing_is_converted_on_a_cpu(student):
    report = to_low_precision(student, LowPrecisionPolicy(dtype="fp8", rows=65_536, multiple_of=1, min_inputs=1))
    assert report.converted == 0
    assert report.layers[0].reason == "no fp8 layer is known to pay on cpu"


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        (nn.Linear(16, 16), {}, "module must contain linear layers, it is one itself: put it into torch.nn.Sequential"),
        (None, {"gate": "table"}, "gate 'table' needs rows, the rows of a training step"),
        (None, {"dtype": "int8", "gradients": "fp8"}, "gradients 'fp8' need dtype 'fp8', got 'int8'"),
        (None, {"skip": ("hed",)}, "skip must name linear layers out of blocks.0, .*, head, got 'hed'"),
    ],
)
def test_each_mistake_is_named(module, change, message, student):
    with pytest.raises(ValueError, match=message):
        to_low_precision(module or student, LowPrecisionPolicy(**({"dtype": "fp8", "gate": "sizes"} | change)))


def test_a_student_is_converted_once(student):
    to_low_precision(student, policy())
    with pytest.raises(ValueError, match=r"module must not have been converted before, blocks.0 was"):
        to_low_precision(student, policy("int8"))
