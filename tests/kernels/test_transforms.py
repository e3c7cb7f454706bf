"""torch.func's transformations, autocast and weights that are replaced: the operations take part in all of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distilbeam.kernels import (
    HardLabels,
    TopKLabels,
    WeightCache,
    distill_loss,
    fp8_linear,
    int8_linear,
    laurel_residual,
    linear_distill_loss,
    quantize_rowwise,
)
from distilbeam.kernels.distillation.terms import Options, make_terms


def labels_of(rows, classes, rng):
    top = torch.randn(rows, classes, generator=rng).log_softmax(1).topk(3, dim=1)
    return TopKLabels(top.values, top.indices)


def alike(function, arguments):
    """Gradients by torch.func and by autograd."""
    found = torch.func.grad(function, argnums=tuple(range(len(arguments))))(*arguments)
    leaves = [x.clone().requires_grad_() for x in arguments]
    for a, b in zip(found, torch.autograd.grad(function(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torch_func_differentiates_the_losses(implementation, reduction, rng):
    labels = labels_of(5, 11, rng)
    options = {"objective": "tail", "reduction": reduction, "implementation": implementation}
    hidden, weight = torch.randn(5, 4, generator=rng), torch.randn(11, 4, generator=rng)
    alike(lambda z: distill_loss(z, labels, **options).sum(), (torch.randn(5, 11, generator=rng),))
    alike(lambda h, w: linear_distill_loss(h, w, None, labels, **options).sum(), (hidden, weight))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_torch_func_differentiates_residuals_and_layers(implementation, quantize, rng):
    rows, weight, scale = torch.randn(2, 6, 8, generator=rng), torch.randn(5, 8, generator=rng), torch.ones(8)

    def loss(update, x, alpha, norm_weight):
        out = laurel_residual(
            update, x, alpha=alpha, norm_weight=norm_weight, quantize=quantize, implementation=implementation
        )
        normed = out.normed if quantize is None else int8_linear(out.normed, weight)
        return (out.residual**2).sum() + (normed**2).sum()

    alike(loss, (*rows, torch.tensor(0.5), scale))
    alike(lambda x, w: (fp8_linear(x, w) ** 2).sum(), (rows[0], weight))


def test_autocast_rounds_the_last_layer_as_it_rounds_linear_layers(implementation, rng):
    """Half of it in bfloat16 already, as the layer before leaves it; gradients come in the parameters' dtypes."""
    labels = labels_of(5, 40, rng)
    hidden, weight, bias = (torch.randn(shape, generator=rng) for shape in ((5, 16), (40, 16), (40,)))
    for given in (hidden, hidden.bfloat16()):
        leaves = [x.clone().requires_grad_() for x in (given, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_distill_loss(*leaves, labels, objective="tail", implementation=implementation)
            if implementation != "reference":  # a backward pass inside of it is not narrowed either
                slopes = torch.autograd.grad(loss, leaves, retain_graph=True)
        if implementation == "reference":
            slopes = torch.autograd.grad(loss, leaves)
        exact = [x.bfloat16().double().requires_grad_() for x in (given, weight)] + [bias.double().requires_grad_()]
        truth = linear_distill_loss(*exact, labels, objective="tail", implementation="reference")
        assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
        for slope, true, leaf in zip(slopes, torch.autograd.grad(truth, exact), leaves, strict=True):
            assert slope.dtype == leaf.dtype
            rtol = 1e-5 if leaf.dtype == torch.float32 else 2**-8
            torch.testing.assert_close(slope.double(), true, rtol=rtol, atol=1e-7)


def test_autocast_leaves_float64_and_rows_in_eight_bits_alone(rng):
    labels = labels_of(5, 40, rng)
    hidden, weight = torch.randn(5, 16, generator=rng), torch.randn(40, 16, generator=rng)
    for operands, precision in (
        ((hidden.double(), weight.double()), None),
        ((quantize_rowwise(hidden, torch.int8), weight), "int8"),
    ):
        plain = linear_distill_loss(*operands, None, labels, objective="tail", precision=precision)
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_distill_loss(*operands, None, labels, objective="tail", precision=precision)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("learned", [False, True])
def test_a_narrow_update_does_not_narrow_the_residual(implementation, learned):
    """A hundred updates of 1e-3 in bfloat16, whose numbers near one are 2^-8 apart."""
    options = {"implementation": implementation}
    if learned:
        options |= {"alpha": torch.ones((), requires_grad=True), "down": torch.zeros(4, 2), "up": torch.zeros(2, 4)}
    start = torch.ones(3, 4, requires_grad=True)
    update = torch.full((3, 4), 1e-3, dtype=torch.bfloat16, requires_grad=True)
    stream = start
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(100):
            stream = laurel_residual(update, stream, **options)
    assert stream.dtype == torch.float32
    torch.testing.assert_close(stream, torch.full((3, 4), 1 + 100 * update[0, 0].item()), rtol=1e-5, atol=0)
    above = torch.full((3, 4), 1 + 2**-12)  # more digits than bfloat16 has
    d_start, d_update = torch.autograd.grad(stream, (start, update), above)
    assert torch.equal(d_start, above)
    assert d_update.dtype == torch.bfloat16
    torch.testing.assert_close(d_update.float(), torch.full((3, 4), 100.0), rtol=2**-7, atol=0)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_norm_of_a_wide_residual_goes_to_the_next_layer_as_its_update_came(implementation, quantize, rng):
    update = torch.randn(6, 16, generator=rng).bfloat16().requires_grad_()
    x, weight = torch.randn(6, 16, generator=rng).requires_grad_(), torch.ones(16).requires_grad_()
    out = laurel_residual(update, x, norm_weight=weight, quantize=quantize, implementation=implementation)
    normed = out.normed if quantize is None else out.normed.straight
    assert (out.residual.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (update, x, weight)]
    truth = laurel_residual(exact[0], exact[1], norm_weight=exact[2], implementation="reference")
    above = torch.randn(6, 16, generator=rng).bfloat16()
    slopes = torch.autograd.grad([out.residual, normed], (update, x, weight), [above.float(), above])
    true = torch.autograd.grad(tuple(truth), exact, [above.double()] * 2)
    for slope, best in zip(slopes, true, strict=True):
        torch.testing.assert_close(
            slope.double(), best, rtol=2**-7 if slope.dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def quantising(cache):
    return lambda w: cache.rows_of(w, lambda x: quantize_rowwise(x, torch.int8))


def test_a_replaced_parameter_never_gets_the_former_ones_rows():
    """A parameter that is gone leaves its address to the next one."""
    cache = WeightCache()
    rows_of = quantising(cache)
    for number in range(20):
        weight = nn.Parameter(torch.full((64, 64), float(number + 1)))
        rows = rows_of(weight)
        torch.testing.assert_close(rows.values.float() * rows.scale, weight.detach())
        del weight, rows


def test_functional_call_and_swapped_tensors_are_other_weights():
    layer, cache = nn.Linear(8, 4, bias=False), WeightCache()

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return int8_linear(x, self.layer.weight, cache=cache)

    module, x = Cached(), torch.eye(8)
    for number in range(5):
        weight = torch.full((4, 8), float(number + 1))
        found = torch.func.functional_call(module, {"layer.weight": weight}, (x,))
        torch.testing.assert_close(found, weight.T)
        del weight
    one, other = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.full((4, 8), 2.0))
    layer.weight = one
    torch.testing.assert_close(module(x), torch.ones(8, 4))
    torch.utils.swap_tensors(one, other)
    torch.testing.assert_close(module(x), torch.full((8, 4), 2.0))


def test_a_step_asks_a_gpu_for_nothing():
    """Terms are made of tensors without data: whoever looked at one would raise; CUDA graphs need no more than that."""
    top = torch.zeros(8, 3, device="meta")
    sparse = TopKLabels(top, top.long(), top[:, 0])
    hard, mask = torch.zeros(8, dtype=torch.long, device="meta"), torch.ones(8, dtype=torch.bool, device="meta")
    for labels in (sparse, HardLabels(hard)):
        for classes in (3, 50):
            options = Options(weight=top[:, 0], objective="tail", mask=mask, hard=hard, normalizer=top[0, 0])
            terms = make_terms(labels, 8, classes, torch.float32, top.device, options)
            assert len(terms) == 2
