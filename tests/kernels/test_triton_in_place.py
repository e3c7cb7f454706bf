"""The fused last layer whose 16-bit logits give way to their gradient, against float64.

On a CUDA GPU, else in Triton's interpreter (test_triton_interpreted.py starts it).
"""

from __future__ import annotations

import narrow_layer
import pytest
import torch
from triton_device import DEVICE, MARKS, needs_fp8

from distilbeam.kernels import HardLabels, distill_loss, linear_distill_loss

pytestmark = MARKS
ROWS = 17


@pytest.fixture(params=["held", "in parts"], autouse=True)
def _parts(request, monkeypatch):
    """All rows together, their products in the backward pass, or sixteen at a time."""
    from distilbeam.kernels.linear_distillation import triton_backend

    monkeypatch.setattr(triton_backend, "ROWS_BYTES", 1 << 30 if request.param == "held" else 1)


def layer(rng, rows, features, classes, dtype):
    shapes = (rows, features), (classes, features), (classes,)
    return [torch.randn(shape, generator=rng).mul(features**-0.25).to(dtype) for shape in shapes]


def moved(labels):
    if isinstance(labels, HardLabels):
        return HardLabels(labels.classes.to(DEVICE))
    parts = {name: None if value is None else value.to(DEVICE) for name, value in vars(labels).items()}
    return type(labels)(**{n: v if v is None or not v.is_floating_point() else v.float() for n, v in parts.items()})


def check(operands, labels, upstream=None, leaf_dtype=None, autocast=False, **options):
    """Value and gradients no further from float64 than those of a layer whose logits are in its own dtype, plus a rounding."""
    reduction = {"reduction": "mean" if upstream is None else "none", **options}
    exact = [x.double().requires_grad_() for x in operands]
    naive = [x.nan_to_num(nan=0.0, neginf=-torch.inf).requires_grad_() for x in operands]
    leaves = [x.to(DEVICE, leaf_dtype or x.dtype).requires_grad_() for x in operands]
    truth = linear_distill_loss(*exact, labels, implementation="reference", **reduction)
    plain = distill_loss(torch.nn.functional.linear(*naive), labels, implementation="reference", **reduction)
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in reduction.items()}
    with torch.autocast(torch.device(DEVICE).type, operands[0].dtype, enabled=autocast):
        found = linear_distill_loss(*leaves, moved(labels), implementation="in_place", **there)
    upstream = torch.ones_like(truth) if upstream is None else upstream.double()
    slopes = torch.autograd.grad(found, leaves, upstream.to(DEVICE).float())
    true_slopes = torch.autograd.grad(truth, exact, upstream)
    plain_slopes = torch.autograd.grad(plain, naive, upstream.float())
    rounding = torch.finfo(operands[0].dtype).eps
    worst = (plain.double() - truth).abs().max()
    assert (found.detach().cpu().double() - truth).abs().max() <= 1.5 * worst + rounding * truth.abs().max()
    for slope, true, simple, leaf in zip(slopes, true_slopes, plain_slopes, leaves, strict=True):
        assert slope.dtype == leaf.dtype
        error = (slope.cpu().double() - true).abs().max()
        # of the logits' gradient, of the factor from above and of the result
        assert error <= 1.5 * (simple.double() - true).abs().max() + 3 * rounding * true.abs().max() + 1e-8


@pytest.mark.parametrize(
    ("objective", "kind", "dtype", "classes"),
    [
        ("tail", "top_k", torch.bfloat16, 300),
        ("truncated_kl", "top_k", torch.float16, 301),
        ("ce", "top_k", torch.bfloat16, 16),
        ("sampled", "sampled", torch.bfloat16, 45),
        ("ce", "hard", torch.float16, 45),
        ("reverse_kl", "top_k", torch.bfloat16, 300),
        ("jsd", "top_k", torch.bfloat16, 301),
        ("skew_reverse_kl", "top_k", torch.float16, 300),
        ("tv", "top_k", torch.bfloat16, 45),
    ],
)
def test_losses_and_gradients(objective, kind, dtype, classes, make_labels, rng):
    operands, labels = layer(rng, ROWS, 48, classes, dtype), make_labels(kind, ROWS, classes)
    weight = torch.rand(ROWS, generator=rng)
    options = {"objective": objective, "temperature": 1.5}
    check(operands, labels, **options)
    check(operands, labels, upstream=weight, **options)


def test_masked_rows_and_absent_classes(make_labels, rng):
    operands = layer(rng, ROWS, 33, 333, torch.bfloat16)
    mask = torch.arange(ROWS) % 3 != 2
    operands[0][2] = torch.nan
    operands[2][320:] = -torch.inf
    upstream = torch.randn(ROWS, generator=rng)
    check(operands, make_labels("top_k", ROWS, 300), upstream, objective="tail", mask=mask)
    check(operands, make_labels("top_k", ROWS, 300), objective="tail", mask=mask, temperature=1.5)


def test_float32_parameters_under_autocast_have_float32_gradients(make_labels, rng):
    operands = layer(rng, ROWS, 48, 130, torch.bfloat16)
    check(operands, make_labels("top_k", ROWS, 130), leaf_dtype=torch.float32, autocast=True, objective="tail")


@pytest.mark.parametrize("classes", [160, 150])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@needs_fp8
def test_logits_of_fp8_rows(classes, reduction, make_labels, rng):
    operands, labels = layer(rng, ROWS, 80, classes, torch.float32), make_labels("top_k", ROWS, classes)
    upstream = torch.randn(ROWS, generator=rng) if reduction == "none" else None
    options = {"objective": "tail", "temperature": 1.5, "reduction": reduction}
    largest = float(torch.nn.functional.linear(*operands).abs().max())
    truth, slopes, sizes = narrow_layer.exact(operands, "fp8", labels, upstream, **options)
    leaves = [x.to(DEVICE).requires_grad_() for x in operands]
    found = linear_distill_loss(*leaves, moved(labels), precision="fp8", implementation="in_place", **options)
    # a loss is off by 2 T times the largest error of a logit at most, a gradient of mass 2 T by as much of it
    off = 2 * 1.5 * 1.1 * 2**-8 * largest
    torch.testing.assert_close(found.detach().cpu().double(), truth, rtol=0, atol=off)
    above = None if upstream is None else upstream.to(DEVICE)
    for slope, true, size in zip(torch.autograd.grad(found, leaves, above), slopes, sizes, strict=True):
        assert slope.dtype == torch.float32
        assert ((slope.cpu().double() - true).abs() <= (2**-7 + 2 * off) * size + off * size.mean()).all()
        assert torch.nn.functional.cosine_similarity(slope.cpu().double().flatten(), true.flatten(), dim=0) > 0.9995


def test_the_loss_can_be_differentiated_again(make_labels, rng):
    leaves = [x.to(DEVICE).requires_grad_() for x in layer(rng, ROWS, 16, 50, torch.bfloat16)]
    labels = moved(make_labels("top_k", ROWS, 50))
    loss = linear_distill_loss(*leaves, labels, objective="tail", implementation="in_place")
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(2 * loss, leaves)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(2 * a, b)
    with torch.no_grad():
        alone = linear_distill_loss(*leaves, labels, objective="tail", implementation="in_place")
    assert float(alone) == float(loss.detach())


def test_frozen_parts_no_bias_and_an_empty_batch(make_labels, rng):
    hidden, weight, _ = (x.to(DEVICE).requires_grad_() for x in layer(rng, ROWS, 16, 50, torch.bfloat16))
    options = {"objective": "tail", "implementation": "in_place"}
    labels = moved(make_labels("top_k", ROWS, 50))
    both = torch.autograd.grad(linear_distill_loss(hidden, weight, None, labels, **options), (hidden, weight))
    (alone,) = torch.autograd.grad(linear_distill_loss(hidden, weight.detach(), None, labels, **options), hidden)
    assert torch.equal(alone, both[0])
    empty = linear_distill_loss(hidden[:0], weight, None, moved(make_labels("top_k", 0, 50)), **options)
    assert float(empty.detach()) == 0
    assert torch.autograd.grad(empty, weight)[0].abs().max() == 0


def test_what_it_cannot_do_is_said(make_labels, rng):
    labels = moved(make_labels("top_k", ROWS, 50))
    wide = [x.to(DEVICE) for x in layer(rng, ROWS, 16, 50, torch.float32)]
    with pytest.raises(
        NotImplementedError, match="in_place: its logits have 16 bits, and those of float32 hidden states"
    ):
        linear_distill_loss(*wide, labels, objective="tail", implementation="in_place")
    narrow = [x.bfloat16() for x in wide]
    with pytest.raises(
        NotImplementedError, match="in_place: it takes sparse labels with a bucket of all other classes"
    ):
        linear_distill_loss(*narrow, labels, objective="renormalised", implementation="in_place")


@needs_fp8
def test_float32_logits_of_fp8_rows_are_refused(make_labels, rng):
    wide = [x.to(DEVICE) for x in layer(rng, ROWS, 16, 50, torch.float32)]
    labels = moved(make_labels("top_k", ROWS, 50))
    with pytest.raises(
        NotImplementedError, match="triton: its logits are float32, and products of fp8 rows come in bf"
    ):
        linear_distill_loss(*wide, labels, objective="tail", precision="fp8", implementation="triton")
