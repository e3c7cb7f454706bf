"""laurel_residual: the sum by hand, its gradients, its normalised and quantised forms, and every message."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import laurel_residual

DIM = 6


def tensors(rng, *shapes):
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_every_part_adds_what_its_formula_says(rng):
    f, x, p, q = tensors(rng, (3, DIM), (3, DIM), (3, DIM), (3, DIM))
    down, up, gamma = tensors(rng, (DIM, 2), (2, DIM), (2,))
    found = laurel_residual(f, x, alpha=0.5, beta=1.5, down=down, up=up, previous=(p, q), gamma=gamma)
    expected = 0.5 * f + 1.5 * (x + x @ down @ up) + gamma[0] * p + gamma[1] * q
    torch.testing.assert_close(found, expected)


def test_without_learned_parts_it_is_the_plain_residual(rng):
    f, x = tensors(rng, (2, 4, DIM), (2, 4, DIM))
    assert torch.equal(laurel_residual(f, x), f + x)


def test_gradients_reach_every_input(rng):
    f, x, p = tensors(rng, (2, DIM), (2, DIM), (2, DIM))
    down, up, gamma, alpha, beta, norm = tensors(rng, (DIM, 2), (2, DIM), (1,), (), (), (DIM,))

    def both(*a):
        out = laurel_residual(
            a[0], a[1], alpha=a[2], beta=a[3], down=a[4], up=a[5], previous=(a[6],), gamma=a[7], norm_weight=a[8]
        )
        return out.residual, out.normed

    assert torch.autograd.gradcheck(both, (f, x, alpha, beta, down, up, p, gamma, norm))


def test_the_normed_form_is_rms_norm(rng):
    f, x, norm = tensors(rng, (5, DIM), (5, DIM), (DIM,))
    out = laurel_residual(f, x, norm_weight=norm)
    expected = torch.nn.functional.rms_norm(f + x, (DIM,), norm, eps=1e-6)
    torch.testing.assert_close(out.normed, expected)
    torch.testing.assert_close(out.residual, f + x)
    assert out.scale is None


@pytest.mark.parametrize(
    ("quantize", "dtype", "relative", "absolute"),
    [("int8", torch.int8, 0.0, 0.5 / 127), ("fp8", torch.float8_e4m3fn, 2**-4, 2**-10 / 448)],
)
def test_quantised_rows_are_within_half_a_step(quantize, dtype, relative, absolute, rng):
    f, x = (torch.randn(9, 32, generator=rng) for _ in range(2))
    out = laurel_residual(f, x, norm_weight=torch.ones(32), quantize=quantize)
    exact = laurel_residual(f, x, norm_weight=torch.ones(32)).normed
    assert out.normed.dtype == dtype
    assert out.scale.shape == (9, 1)
    error = (out.normed.float() * out.scale - exact).abs()
    largest = exact.abs().amax(dim=1, keepdim=True)
    assert bool((error <= relative * exact.abs() + absolute * largest + 1e-6).all())


def test_a_row_of_zeros_quantises_to_zeros():
    out = laurel_residual(torch.zeros(1, 4), torch.zeros(1, 4), norm_weight=torch.ones(4), quantize="int8")
    assert out.normed.tolist() == [[0, 0, 0, 0]]
    assert bool(torch.isfinite(out.scale).all())


def test_bfloat16_is_accumulated_in_float32(rng):
    f, x = (torch.randn(4, 64, generator=rng).bfloat16() for _ in range(2))
    found = laurel_residual(f, x, alpha=0.3125, beta=1.6875)
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
