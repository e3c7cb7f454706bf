"""The Triton forms that prepare the label themselves, against float64: in one kernel, in two, of dense labels.

On a CUDA GPU, else in Triton's interpreter (test_triton_interpreted.py starts it).
"""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, MARKS

from distilbeam.kernels import DenseLabels, HardLabels, TopKLabels, distill_loss

pytestmark = MARKS
ROWS = 6


def moved(labels):
    if isinstance(labels, HardLabels):
        return HardLabels(labels.classes.to(DEVICE))
    parts = {name: None if value is None else value.to(DEVICE) for name, value in vars(labels).items()}
    return type(labels)(**{n: v if v is None or not v.is_floating_point() else v.float() for n, v in parts.items()})


def prepared_by(implementation, logits, labels, **options):
    """Value and gradient of a form that prepares the label itself, and of the float64 reference."""
    exact, leaf = logits.double().requires_grad_(), logits.to(DEVICE).requires_grad_()
    truth = distill_loss(exact, labels, reduction="none", implementation="reference", **options)
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    found = distill_loss(leaf, moved(labels), reduction="none", implementation=implementation, **there)
    above = torch.full((len(logits),), 0.5, device=DEVICE)
    slope = torch.autograd.grad(found, leaf, above)[0].cpu().double()
    best = torch.autograd.grad(truth, exact, above.cpu().double())[0]
    torch.testing.assert_close(found.detach().cpu().double(), truth.detach(), rtol=3e-5, atol=3e-6)
    rtol = max(6e-6, 2 * torch.finfo(logits.dtype).eps if logits.dtype != torch.float32 else 0)
    torch.testing.assert_close(slope, best, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("classes", [300, 9000, 20_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_and_gradient_in_one_kernel(classes, dtype, rng):
    """Blocks in registers, blocks read again and a tail; the factor from above is one for no row, then for all."""
    logits = torch.randn(ROWS, classes, generator=rng).to(dtype)
    top = torch.randn(ROWS, classes, generator=rng, dtype=torch.float64).log_softmax(1).topk(30, dim=1)
    labels = TopKLabels(top.values, top.indices)
    exact = logits.double().requires_grad_()
    truth = distill_loss(exact, labels, objective="tail", reduction="none", implementation="reference")
    for factor in (0.5, 1.0):
        leaf = logits.to(DEVICE).requires_grad_()
        found = distill_loss(leaf, moved(labels), objective="tail", reduction="none", implementation="one_kernel")
        torch.testing.assert_close(found.detach().cpu().double(), truth.detach(), rtol=3e-5, atol=3e-6)
        above = torch.full((ROWS,), factor, device=DEVICE)
        slope = torch.autograd.grad(found, leaf, above, retain_graph=True)[0].cpu().double()
        best = torch.autograd.grad(truth, exact, above.cpu().double(), retain_graph=True)[0]
        torch.testing.assert_close(slope, best, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        with pytest.raises(RuntimeError, match="'one_kernel' hands its gradient on once; use 'triton'"):
            torch.autograd.grad(found, leaf, above)


@pytest.mark.parametrize("implementation", ["one_kernel", "two_kernels"])
@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"])
def test_other_divergences(objective, implementation, make_labels, rng):
    logits = torch.randn(ROWS, 301, generator=rng).bfloat16()
    labels = make_labels("top_k", ROWS, 301)
    prepared_by(implementation, logits, labels, objective=objective, temperature=1.7, beta=0.3, alpha=0.2)


@pytest.mark.parametrize(
    "classes",
    # less than an octet, one more than a block's 1,024, whole octets; the others are further remainders
    [3, 1025, 8200, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (9, 45, 1023, 33_001))],
)
@pytest.mark.parametrize("implementation", ["one_kernel", "two_kernels"])
def test_rows_that_begin_anywhere(classes, implementation, rng, monkeypatch):
    """Kept classes in the first and the last octet, in the edges before and behind them, and where blocks and parts meet."""
    from distilbeam.kernels.distillation import triton_given_backend

    monkeypatch.setattr(triton_given_backend, "SPAN", 4096)
    logits = torch.randn(9, classes, generator=rng).bfloat16()
    marks = torch.tensor([0, 1, 6, 7, 8, 4095, 4096, 8191, 8192, classes - 8, classes - 2, classes - 1])
    marks = marks[(marks >= 0) & (marks < classes)].unique()
    kept = marks.expand(9, -1).clone()
    values = torch.randn(9, len(marks), generator=rng, dtype=torch.float64).log_softmax(1) - 0.3
    kept[4, 1:] = -1
    labels = TopKLabels(values, kept, torch.full((9,), 1 - 0.7408182206817179, dtype=torch.float64).log())
    prepared_by(implementation, logits, labels, objective="tail")
    wide = torch.full((9, classes + 9), torch.nan, dtype=torch.bfloat16)
    for first in (0, 3):  # rows at other distances, and behind something else
        wide[:, first : first + classes] = logits
        prepared_by(implementation, wide[:, first : first + classes], labels, objective="truncated_kl", temperature=1.7)
    prepared_by(implementation, logits, HardLabels(marks[torch.arange(9) % len(marks)]))


@pytest.mark.parametrize("implementation", ["one_kernel", "two_kernels"])
def test_a_row_that_keeps_every_class_has_no_tail(implementation, rng):
    """Whatever its label says; a row with padding has one."""
    logits = torch.randn(4, 5, generator=rng).bfloat16()
    values = torch.randn(4, 5, generator=rng, dtype=torch.float64).log_softmax(1) - 0.2
    kept = torch.stack([torch.randperm(5, generator=rng) for _ in range(4)])
    kept[2, 3] = -1
    for tail in (torch.full((4,), -1.7, dtype=torch.float64), None):
        for objective in ("tail", "truncated_kl"):
            prepared_by(implementation, logits, TopKLabels(values, kept, tail), objective=objective)


def test_logits_beside_the_gradient_and_its_neighbours_stay(rng):
    """Both forms write through octets: nothing outside of the rows may change, neither before, between nor behind them."""
    from distilbeam.kernels.distillation import triton_given_backend as backend
    from distilbeam.kernels.distillation.given import given
    from distilbeam.kernels.distillation.terms import Options

    logits = torch.randn(5, 83, generator=rng).bfloat16().to(DEVICE)
    top = torch.randn(5, 83, generator=rng, dtype=torch.float64).log_softmax(1).topk(4, dim=1)
    call = given(moved(TopKLabels(top.values, top.indices)), 5, 83, Options(objective="tail"))
    around = torch.full((7, 83), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    room = around.flatten()[8 : 8 + 5 * 83].view(5, 83)  # begins on 16 bytes
    backend._sparse(logits, call.labels, call, torch.empty(5, device=DEVICE), room)
    assert bool(room.isfinite().all())
    assert bool(around.flatten()[:8].isnan().all())
    assert bool(around.flatten()[8 + 5 * 83 :].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("objective", "temperature"), [("kl", 1.0), ("kl", 2.5), ("ce", 1.0)])
@pytest.mark.parametrize("classes", [45, 5000, 9003])
def test_dense_labels_prepared_by_the_kernel(classes, dtype, objective, temperature, rng):
    teacher = (3 * torch.randn(ROWS, classes, generator=rng, dtype=torch.float64)).log_softmax(1)
    teacher[1, 40:] = -torch.inf
    teacher += torch.randn(ROWS, 1, generator=rng, dtype=torch.float64)  # rows are normalised on the way
    logits = (4 * torch.randn(ROWS, classes, generator=rng)).to(dtype)
    logits[2, :7] = -torch.inf  # classes that do not exist
    logits[3] = torch.nan
    options = {"objective": objective, "temperature": temperature, "mask": torch.arange(ROWS) != 3}
    options["weight"] = torch.rand(ROWS, generator=rng)
    prepared_by("one_kernel", logits, DenseLabels(teacher), **options)
    gaps = torch.full((ROWS, classes + 3), torch.nan, dtype=torch.float64)
    gaps[:, 1:-2] = teacher
    prepared_by("one_kernel", logits, DenseLabels(gaps[:, 1:-2]), **options)


@pytest.mark.parametrize("implementation", ["one_kernel", "two_kernels"])
@pytest.mark.parametrize("outside", [70, 2**31 - 1, 2**40])
def test_a_class_that_does_not_exist_is_found_where_the_kernel_prepares_the_label(
    outside, implementation, make_labels, rng
):
    from distilbeam.kernels.distillation import triton_given_backend as backend
    from distilbeam.kernels.distillation.given import Given

    labels = make_labels("top_k", ROWS, 70)
    labels.classes[2, 1] = outside
    leaf = torch.randn(ROWS, 70, generator=rng).bfloat16().to(DEVICE).requires_grad_()
    call = Given(moved(labels), "tail", 1.0, None, None, None, 1.0)
    found = getattr(backend, implementation)(leaf, call, False)
    slope = torch.autograd.grad(found.sum(), leaf)[0].cpu()
    others = torch.arange(ROWS) != 2
    assert bool(found.isnan()[2])
    assert bool(slope[2].isnan().all())
    assert bool(found.detach().cpu()[others].isfinite().all())
    assert bool(slope[others].isfinite().all())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_of_prepared_labels_divides_by_what_counts(reduction, make_labels, rng):
    logits = torch.randn(ROWS, 70, generator=rng).bfloat16()
    hard = torch.tensor([3, -100, 5, 6, -100, 8])
    for labels, mask in ((HardLabels(hard), torch.arange(ROWS) != 2), (make_labels("top_k", ROWS, 70), None)):
        for normalizer in (None, 2.5):
            options = {"objective": "tail", "mask": mask, "reduction": reduction, "normalizer": normalizer}
            truth = distill_loss(logits.double(), labels, implementation="reference", **options)
            options["mask"] = None if mask is None else mask.to(DEVICE)
            for implementation in ("one_kernel", "two_kernels"):
                found = distill_loss(logits.to(DEVICE), moved(labels), implementation=implementation, **options)
                torch.testing.assert_close(found.cpu().double(), truth, rtol=3e-5, atol=3e-6)


def test_two_kernels_differentiate_again_and_take_an_empty_batch(make_labels, rng):
    leaf = torch.randn(ROWS, 301, generator=rng).to(DEVICE).requires_grad_()
    options = {"objective": "tail", "implementation": "two_kernels"}
    loss = distill_loss(leaf, moved(make_labels("top_k", ROWS, 301)), **options)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, leaf)
    assert torch.equal(twice, 2 * once)
    for implementation in ("one_kernel", "two_kernels"):
        empty = torch.empty(0, 40, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        none = moved(make_labels("top_k", 0, 40))
        loss = distill_loss(empty, none, objective="tail", implementation=implementation)
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0, 40)


def test_what_the_kernels_that_prepare_labels_cannot_do_is_said(make_labels):
    labels, tail = moved(make_labels("top_k", ROWS, 70)), {"objective": "tail"}
    with pytest.raises(
        NotImplementedError,
        match=r"one_kernel: it holds logits of 16 bits, got float32\); .*triton and two_kernels can",
    ):
        distill_loss(torch.zeros(ROWS, 70, device=DEVICE), labels, implementation="one_kernel", **tail)
    narrow = torch.zeros(ROWS, 70, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="one_kernel: it prepares no label of objective 'renormalised'"):
        distill_loss(narrow, labels, objective="renormalised", implementation="one_kernel")
    hard = torch.zeros(ROWS, dtype=torch.long, device=DEVICE)
    with pytest.raises(NotImplementedError, match="two_kernels: it takes no true classes beside the label"):
        distill_loss(narrow, labels, hard=hard, implementation="two_kernels", **tail)
    dense = moved(make_labels("dense", ROWS, 70))
    with pytest.raises(NotImplementedError, match="it prepares dense labels for forward KL, not for objective 'jsd'"):
        distill_loss(narrow, dense, objective="jsd", implementation="one_kernel")
    with pytest.raises(NotImplementedError, match="two_kernels: it takes sparse labels"):
        distill_loss(narrow, dense, implementation="two_kernels")
