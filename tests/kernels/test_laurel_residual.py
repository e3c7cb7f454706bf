"""laurel_residual: the sum by hand, its gradients, its normalised and quantised forms, what it keeps, and every message."""

from __future__ import annotations

import itertools

import laurel_problem
import pytest
import torch
from laurel_problem import Case

from distilbeam.kernels import dequantize_rowwise, fp8_linear, int8_linear, laurel_residual
from distilbeam.kernels.laurel import chunked
from distilbeam.kernels.laurel.shapes import ODD

DIM = 6


@pytest.fixture(params=["reference", "chunked"])
def implementation(request, monkeypatch):
    """Backends of a CPU; the blocks are small, so that there are several."""
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "FEWEST_ROWS", 2)
    return request.param


def tensors(rng, *shapes):
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_every_part_adds_what_its_formula_says(implementation, rng):
    f, x, p, q = tensors(rng, (3, DIM), (3, DIM), (3, DIM), (3, DIM))
    down, up, gamma = tensors(rng, (DIM, 2), (2, DIM), (2,))
    parts = {"alpha": 0.5, "beta": 1.5, "down": down, "up": up, "previous": (p, q), "gamma": gamma}
    found = laurel_residual(f, x, **parts, implementation=implementation)
    expected = 0.5 * f + 1.5 * (x + x @ down @ up) + gamma[0] * p + gamma[1] * q
    torch.testing.assert_close(found, expected)


def test_without_learned_parts_it_is_the_plain_residual(implementation, rng):
    f, x = tensors(rng, (2, 4, DIM), (2, 4, DIM))
    assert torch.equal(laurel_residual(f, x, implementation=implementation), f + x)


PARTS = ["alpha", "beta", "maps", "previous", "norm"]


@pytest.mark.parametrize("parts", [c for n in (0, 1, 5) for c in itertools.combinations(PARTS, n)], ids="-".join)
def test_gradients_are_those_of_finite_differences(implementation, parts, rng):
    f, x, p, q = tensors(rng, (2, 3, DIM), (2, 3, DIM), (2, 3, DIM), (2, 3, DIM))
    down, up, gamma, alpha, beta, norm = tensors(rng, (DIM, 2), (2, DIM), (2,), (), (), (DIM,))
    learned = {"alpha": {"alpha": alpha}, "beta": {"beta": beta}, "maps": {"down": down, "up": up}}
    learned |= {"previous": {"gamma": gamma, "p": p, "q": q}, "norm": {"norm_weight": norm}}
    leaves = {"f": f, "x": x, **{name: x for part in parts for name, x in learned[part].items()}}

    def compute(*values):
        given = dict(zip(leaves, values, strict=True))
        f, x, previous = given.pop("f"), given.pop("x"), [given.pop(name) for name in "pq" if name in given]
        out = laurel_residual(f, x, **given, previous=previous, implementation=implementation)
        return out if isinstance(out, torch.Tensor) else tuple(out)

    assert torch.autograd.gradcheck(compute, tuple(leaves.values()))


def test_only_one_output_used_is_enough(implementation, rng):
    f, x, norm = tensors(rng, (5, DIM), (5, DIM), (DIM,))
    out = laurel_residual(f, x, alpha=0.5, norm_weight=norm, implementation=implementation)
    (alone,) = torch.autograd.grad(out.residual.sum(), f, retain_graph=True)
    torch.testing.assert_close(alone, torch.full_like(f, 0.5))
    (slope,) = torch.autograd.grad(out.normed.sum(), x)
    plain = torch.nn.functional.rms_norm(0.5 * f + x, (DIM,), norm, eps=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), x)[0])


def test_the_reference_differentiates_twice(rng):
    f, x, alpha = tensors(rng, (2, DIM), (2, DIM), ())
    down, up = tensors(rng, (DIM, 2), (2, DIM))

    def compute(f, x, alpha, down, up):
        return laurel_residual(f, x, alpha=alpha, down=down, up=up, implementation="reference")

    assert torch.autograd.gradgradcheck(compute, (f, x, alpha, down, up))


CASES = [
    Case(37, 50, 4, 2, norm=True),
    Case(37, 50, 4, 2, norm=True, dtype=torch.bfloat16),
    Case(20, 33, 0, 1, norm=True, quantize="int8"),
    Case(20, 33, 3, 1, norm=True, quantize="fp8", dtype=torch.bfloat16),
    Case(9, 17, 5, dtype=torch.float16),
    *(Case(*shape, norm=True) for shape in ODD),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_blocks_agree_with_float64(case, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "FEWEST_ROWS", 8)
    laurel_problem.check(case, "chunked")


def test_blocks_keep_little_for_the_backward_pass(rng):
    rows, dim, rank = 64, 32, 4
    f, x = (torch.randn(rows, dim, generator=rng).requires_grad_() for _ in range(2))
    down, up = torch.randn(dim, rank).requires_grad_(), torch.randn(rank, dim).requires_grad_()
    sizes = {}
    for implementation in ("chunked", "reference"):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = laurel_residual(f, x, alpha=torch.tensor(0.5), down=down, up=up, implementation=implementation)
        for leaf in (f, x, down, up, y):
            kept.pop(leaf.untyped_storage().data_ptr(), None)
        sizes[implementation] = sum(kept.values())
    assert sizes["chunked"] <= 4 * rows * rank + 16  # x A and the coefficients
    assert sizes["chunked"] < sizes["reference"] + 16


def test_eight_bit_rows_feed_the_next_layer_and_bring_its_gradient_back(implementation, rng):
    f, x, norm = (torch.randn(shape, generator=rng).requires_grad_() for shape in ((2, 9, 32), (2, 9, 32), (32,)))
    weight = torch.randn(16, 32, generator=rng).requires_grad_()
    upstream = torch.randn(2, 9, 16, generator=rng)
    for quantize, layer in (("fp8", fp8_linear), ("int8", int8_linear)):
        out = laurel_residual(f, x, norm_weight=norm, quantize=quantize, implementation=implementation)
        slopes = torch.autograd.grad(layer(out.normed, weight), (f, x, norm, weight), upstream)
        exact = torch.nn.functional.rms_norm(f + x, (32,), norm, eps=1e-6) @ weight.T
        expected = torch.autograd.grad(exact, (f, x, norm, weight), upstream)
        for slope, truth in zip(slopes, expected, strict=True):
            error = (slope - truth).norm() / truth.norm()
            assert 0 < error < {"fp8": 0.06, "int8": 0.02}[quantize]


def test_nothing_is_narrowed_under_autocast(implementation, rng):
    f, x = (torch.randn(4, 64, generator=rng) for _ in range(2))
    down, up = torch.randn(64, 4, generator=rng) / 8, torch.randn(4, 64, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        found = laurel_residual(f, x, down=down, up=up, implementation=implementation)
    torch.testing.assert_close(found, f + x + (x @ down) @ up)


def test_a_backward_pass_inside_autocast_is_as_exact(rng):
    f, x = (torch.randn(4, 64, generator=rng).requires_grad_() for _ in range(2))
    down, up = torch.randn(64, 4, generator=rng) / 8, torch.randn(4, 64, generator=rng)
    weight = torch.randn(16, 64, generator=rng).requires_grad_()
    slopes = []
    for inside in (False, True):
        residual = laurel_residual(f, x, down=down, up=up, implementation="chunked")
        y = fp8_linear(residual, weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            slopes.append(torch.autograd.grad(y.sum(), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_shapes_strides_and_nothing_at_all(implementation, rng):
    f, x = (torch.randn(2, DIM, 3, generator=rng).movedim(1, -1) for _ in range(2))
    assert torch.equal(laurel_residual(f, x, alpha=2.0, implementation=implementation), 2 * f + x)
    empty = torch.empty(0, DIM, requires_grad=True)
    down, up = torch.ones(DIM, 2, requires_grad=True), torch.ones(2, DIM)
    out = laurel_residual(empty, empty, down=down, up=up, norm_weight=torch.ones(DIM), implementation=implementation)
    assert out.normed.shape == (0, DIM)
    assert torch.autograd.grad(out.normed.sum(), down)[0].abs().max() == 0


def test_the_normed_form_is_rms_norm(implementation, rng):
    f, x, norm = tensors(rng, (5, DIM), (5, DIM), (DIM,))
    out = laurel_residual(f, x, norm_weight=norm, implementation=implementation)
    expected = torch.nn.functional.rms_norm(f + x, (DIM,), norm, eps=1e-6)
    torch.testing.assert_close(out.normed, expected)
    torch.testing.assert_close(out.residual, f + x)


@pytest.mark.parametrize(
    ("quantize", "dtype", "relative", "absolute"),
    [("int8", torch.int8, 0.0, 0.5 / 127), ("fp8", torch.float8_e4m3fn, 2**-4, 2**-10 / 448)],
)
def test_quantised_rows_are_within_half_a_step(quantize, dtype, relative, absolute, implementation, rng):
    f, x = (torch.randn(9, 32, generator=rng) for _ in range(2))
    out = laurel_residual(f, x, norm_weight=torch.ones(32), quantize=quantize, implementation=implementation)
    exact = laurel_residual(f, x, norm_weight=torch.ones(32)).normed
    assert out.normed.values.dtype == dtype
    assert out.normed.scale.shape == (9, 1)
    error = (dequantize_rowwise(out.normed) - exact).abs()
    largest = exact.abs().amax(dim=1, keepdim=True)
    assert bool((error <= relative * exact.abs() + absolute * largest + 1e-6).all())


def test_a_row_of_zeros_quantises_to_zeros(implementation):
    f, norm = torch.zeros(1, 4), torch.ones(4)
    out = laurel_residual(f, f, norm_weight=norm, quantize="int8", implementation=implementation)
    assert out.normed.values.tolist() == [[0, 0, 0, 0]]
    assert bool(torch.isfinite(out.normed.scale).all())


def test_bfloat16_is_accumulated_in_float32(implementation, rng):
    f, x = (torch.randn(4, 64, generator=rng).bfloat16() for _ in range(2))
    found = laurel_residual(f, x, alpha=0.3125, beta=1.6875, implementation=implementation)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (f.double() * 0.3125 + x.double() * 1.6875).float().bfloat16())


def test_each_mistake_is_named():
    f = torch.zeros(2, DIM)
    for keywords, message in (
        ({"residual": torch.zeros(2, 5)}, r"residual must have the shape of update, \[2, 6\], got \[2, 5\]"),
        ({"down": torch.zeros(DIM, 2)}, "down and up must be given together"),
        ({"down": torch.zeros(DIM, 2), "up": torch.zeros(3, DIM)}, r"down must be \[6, r\] and up \[r, 6\]"),
        ({"previous": (f,)}, "gamma must have one weight for each of the 1 previous tensors, got 0"),
        ({"previous": (f[:1],), "gamma": torch.zeros(1)}, r"previous\[0\] must have the shape of update"),
        ({"quantize": "fp8"}, "quantize must be 'fp8' or 'int8' and needs norm_weight"),
        ({"implementation": "tritn"}, "implementation of laurel_residual must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            laurel_residual(f, keywords.pop("residual", f), **keywords)
