"""The Triton kernels against float64: on a CUDA GPU, else in Triton's interpreter (test_triton_interpreted.py starts it)."""

from __future__ import annotations

import narrow_layer
import pytest
import torch
from triton_device import DEVICE, MARKS

from distilbeam.kernels import DenseLabels, HardLabels, TopKLabels, distill_loss, linear_distill_loss
from distilbeam.kernels.distillation.shapes import ODD

pytestmark = MARKS
ROWS = 6


def moved(labels):
    if isinstance(labels, HardLabels):
        return HardLabels(labels.classes.to(DEVICE))
    parts = {name: None if value is None else value.to(DEVICE) for name, value in vars(labels).items()}
    return type(labels)(**{n: v if v is None or not v.is_floating_point() else v.float() for n, v in parts.items()})


def both(logits, labels, **options):
    """Value and gradient of the kernel, and of the float64 reference on the same numbers."""
    exact, leaf = logits.double().requires_grad_(), logits.to(DEVICE).requires_grad_()
    upstream = torch.randn(len(logits), generator=torch.Generator().manual_seed(1))
    truth = distill_loss(exact, labels, reduction="none", implementation="reference", **options)
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    found = distill_loss(leaf, moved(labels), reduction="none", implementation="triton", **there)
    return (
        found.detach().cpu().double(),
        truth.detach(),
        torch.autograd.grad(found, leaf, upstream.to(DEVICE))[0].cpu().double(),
        torch.autograd.grad(truth, exact, upstream.double())[0],
    )


def check(logits, labels, least_rtol=6e-6, **options):
    found, truth, slope, true_slope = both(logits, labels, **options)
    torch.testing.assert_close(found, truth, rtol=3e-5, atol=3e-6)
    # half a unit in the last place of the gradient's dtype, twice: once when stored, once when scaled from above
    rtol = max(least_rtol, 2 * torch.finfo(logits.dtype).eps if logits.dtype != torch.float32 else 0)
    torch.testing.assert_close(slope, true_slope, rtol=rtol, atol=2e-7 if logits.dtype != torch.float16 else 1e-6)


@pytest.mark.parametrize(
    ("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 2.5), (torch.float16, 2.5)], ids=str
)
def test_every_objective(setting, dtype, temperature, make_labels, rng):
    objective, kind, mixing = setting
    extra = {}
    if objective == "slam":
        accuracy = 0.5 + 0.5 * torch.rand(ROWS, generator=rng)
        extra = {"accuracy": accuracy, "candidates": torch.tensor([1, 2, 3, 4, 2, 3]), "mixing": mixing}
    logits = (2 * torch.randn(ROWS, 150, generator=rng)).to(dtype)
    weight = torch.rand(ROWS, generator=rng)
    labels = make_labels(kind, ROWS, 150)
    check(logits, labels, objective=objective, temperature=temperature, weight=weight, **extra)


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(shape, rng):
    rows, classes, k = shape
    top = torch.randn(rows, classes, generator=rng, dtype=torch.float64).log_softmax(1).topk(k, dim=1)
    check(torch.randn(rows, classes, generator=rng), TopKLabels(top.values, top.indices), objective="tail")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "temperature"),
    [("kl", 1.0), ("kl", 2.5), ("ce", 1.0), ("reverse_kl", 1.0), ("jsd", 2.5), ("skew_kl", 1.0), ("tv", 2.5)],
)
def test_long_dense_rows(dtype, objective, temperature, rng):
    rows, classes = 4, 5003
    teacher = (3 * torch.randn(rows, classes, generator=rng, dtype=torch.float64)).log_softmax(1)
    teacher[1, 40:] = -torch.inf  # where a reverse KL would be infinite
    logits = (4 * torch.randn(rows, classes, generator=rng)).to(dtype)
    logits[2, :7] = -torch.inf  # classes that do not exist
    mask = torch.tensor([True, True, True, False])
    logits[3] = torch.nan
    hard = torch.tensor([3, -100, 5000, 6])  # a second term, added to the first
    options = {"objective": objective, "temperature": temperature, "mask": mask}
    check(logits, DenseLabels(teacher), **options)
    check(logits, DenseLabels(teacher), hard=hard, hard_share=0.4, **options)


def test_gradients_of_a_row_in_several_parts(make_labels, rng, monkeypatch):
    from distilbeam.kernels.distillation import triton_backend

    monkeypatch.setattr(triton_backend, "SPAN", 160)
    logits = torch.randn(ROWS, 700, generator=rng)
    mask = torch.tensor([True, False, True, True, False, True])
    logits[1] = torch.nan
    hard = torch.tensor([3, 4, -100, 699, 160, 159])
    for kind, objective in (("top_k", "tail"), ("top_k", "renormalised"), ("sampled", "sampled")):
        labels = make_labels(kind, ROWS, 700, k=30)
        check(logits, labels, objective=objective, mask=mask, hard=hard, hard_share=0.4)
        check(logits.bfloat16(), labels, objective=objective, mask=mask)


def test_a_loss_can_be_differentiated_again_with_other_factors(make_labels, rng):
    for kind in ("top_k", "dense"):
        leaf = torch.randn(ROWS, 300, generator=rng).to(DEVICE).requires_grad_()
        objective = {"objective": "tail" if kind == "top_k" else "kl", "reduction": "none", "implementation": "triton"}
        loss = distill_loss(leaf, moved(make_labels(kind, ROWS, 300)), **objective)
        ones = torch.ones(ROWS, device=DEVICE)
        (once,) = torch.autograd.grad(loss, leaf, ones, retain_graph=True)
        kept = once.clone()
        (twice,) = torch.autograd.grad(loss, leaf, 2 * ones, retain_graph=True)
        (again,) = torch.autograd.grad(loss.sum(), leaf)  # its factor has no stride
        assert torch.equal(once, kept)
        assert torch.equal(twice, 2 * kept)
        assert torch.equal(again, kept)


def test_rows_that_do_not_count_and_true_classes(make_labels, rng):
    logits = torch.randn(ROWS, 70, generator=rng)
    mask = torch.tensor([True, False, True, True, False, True])
    logits[1] = torch.nan
    hard = torch.tensor([3, 4, -100, 6, 7, -100])
    check(logits, make_labels("top_k", ROWS, 70), objective="tail", mask=mask, hard=hard, hard_share=0.4)


def test_padded_classes_and_strides(make_labels, rng):
    wide = torch.randn(80, ROWS, generator=rng).T
    wide[:, 70:] = -torch.inf
    assert not wide.is_contiguous()
    check(wide, make_labels("top_k", ROWS, 70), objective="tail")
    dense = make_labels("dense", ROWS, 70)
    padded = DenseLabels(torch.nn.functional.pad(dense.logprobs, (0, 10), value=-torch.inf))
    check(wide, padded, objective="kl", temperature=2.0)


def test_saturated_logits(setting, make_labels):
    objective, kind, mixing = setting
    extra = {"accuracy": 0.75, "candidates": 3, "mixing": mixing} if objective == "slam" else {}
    logits = torch.zeros(ROWS, 40)
    logits[:, 0], logits[:, 1] = 500.0, -500.0
    # log-probabilities of 500 have an absolute error of 500 eps = 6e-5, which is what their exponentials are off by
    check(logits, make_labels(kind, ROWS, 40), least_rtol=6e-5, objective=objective, **extra)


def test_a_student_that_is_sure_of_the_kept_classes_still_learns_the_tail(rng):
    """The rest's mass is below the rounding of the whole: subtracting would lose it."""
    logits = torch.randn(2, 500, generator=rng)
    logits[:, :3] += 40
    kept = torch.tensor([[0.6, 0.2, 0.1]]).log().expand(2, -1).double()
    labels = TopKLabels(kept, torch.arange(3).expand(2, -1), torch.full((2,), 0.1, dtype=torch.float64).log())
    check(logits, labels, objective="tail")


def test_all_masked_and_empty_batches(make_labels):
    leaf = torch.full((ROWS, 40), torch.nan, device=DEVICE, requires_grad=True)
    labels = moved(make_labels("top_k", ROWS, 40))
    nobody = torch.zeros(ROWS, dtype=torch.bool, device=DEVICE)
    loss = distill_loss(leaf, labels, objective="tail", mask=nobody, implementation="triton")
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, leaf)[0].abs().max() == 0
    empty = torch.empty(0, 40, device=DEVICE, requires_grad=True)
    loss = distill_loss(empty, moved(make_labels("top_k", 0, 40)), objective="tail", implementation="triton")
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 40)


def test_nothing_is_written_outside_the_gradient(make_labels, rng):
    from distilbeam.kernels.distillation.terms import Options, make_terms
    from distilbeam.kernels.distillation.triton_backend import launch

    rows, classes, margin = 3, 45, 64
    logits = torch.randn(rows, classes, generator=rng).to(DEVICE)
    around = torch.full((rows * classes + 2 * margin,), torch.nan, device=DEVICE)
    inner = around[margin:-margin].view(rows, classes)
    for kind in ("top_k", "dense"):
        around.fill_(torch.nan)
        losses = torch.empty(rows, device=DEVICE)
        options = Options(objective="tail" if kind == "top_k" else "kl")
        terms = make_terms(
            moved(make_labels(kind, rows, classes)), rows, classes, torch.float32, logits.device, options
        )
        launch(logits, terms[0], losses, inner, add=False)
        assert bool(torch.isfinite(inner).all())
        assert bool(torch.isnan(around[:margin]).all())
        assert bool(torch.isnan(around[-margin:]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [45, 9000])
def test_the_gradient_may_take_the_place_of_the_logits(dtype, classes, rng):
    from distilbeam.kernels.distillation.terms import Options, make_terms
    from distilbeam.kernels.distillation.triton_backend import launch

    rows = 5
    logits = torch.randn(rows, classes, generator=rng).to(DEVICE)
    bias = torch.randn(classes, generator=rng).to(DEVICE, dtype)
    top = torch.randn(rows, classes, generator=rng, dtype=torch.float64).log_softmax(1).topk(4, dim=1)
    labels = moved(TopKLabels(top.values, top.indices))
    (term,) = make_terms(labels, rows, classes, torch.float32, logits.device, Options(objective="tail"))
    losses, again = torch.empty(2, rows, device=DEVICE).unbind()
    apart = torch.empty(rows, classes, dtype=dtype, device=DEVICE)
    launch(logits, term, losses, apart, add=False, bias_C=bias)
    exact = (logits + bias.float()).double().requires_grad_()
    truth = distill_loss(exact, labels, objective="tail", reduction="none", implementation="reference")
    torch.testing.assert_close(losses * rows, truth.detach().float(), rtol=3e-5, atol=3e-6)
    rtol = max(6e-6, 2 * torch.finfo(dtype).eps)
    slope = rows * apart.double()
    torch.testing.assert_close(slope, torch.autograd.grad(truth.sum(), exact)[0], rtol=rtol, atol=2e-6)
    taken = logits.view(dtype)[:, :classes]
    launch(logits, term, again, taken, add=False, bias_C=bias)
    assert torch.equal(losses, again)
    assert torch.equal(taken, apart)


@pytest.mark.parametrize("objective", ["tail", "renormalised", "hard"])
@pytest.mark.parametrize("outside", [70, 1000, 2**31 - 1])
def test_a_class_that_does_not_exist_makes_its_row_nan_and_no_other(objective, outside, make_labels, rng):
    """Nobody looks at classes on a GPU before; without this, a neighbouring row's logit would be taken."""
    from distilbeam.kernels.distillation.targets import prepare
    from distilbeam.kernels.distillation.terms import Term
    from distilbeam.kernels.distillation.triton_backend import total

    labels = make_labels("hard" if objective == "hard" else "top_k", ROWS, 70)
    if objective == "hard":
        labels.classes[2] = outside
    else:
        labels.classes[2, 1] = outside
    leaf = torch.randn(ROWS, 70, generator=rng).to(DEVICE).requires_grad_()
    targets = prepare(moved(labels), 70, "kl" if objective == "hard" else objective)
    term = Term(targets, torch.ones(ROWS, device=DEVICE), None)
    found = total(leaf, [term], False)
    slope = torch.autograd.grad(found.sum(), leaf)[0].cpu()
    others = torch.arange(ROWS) != 2
    assert bool(found.isnan()[2])
    assert bool(slope[2].isnan().all())
    assert bool(found.detach().cpu()[others].isfinite().all())
    assert bool(slope[others].isfinite().all())


def test_logits_that_lie_column_by_column(make_labels, rng):
    """20,000 x 128,256 of them reach beyond 2^31 numbers, which an offset of 32 bits does not."""
    labels = make_labels("top_k", ROWS, 70)
    wide = torch.randn(70, ROWS, generator=rng).T
    found = [
        distill_loss(z.to(DEVICE).requires_grad_(), moved(labels), objective="tail", implementation="triton").detach()
        for z in (wide, wide.contiguous())
    ]
    assert torch.equal(*found)


def layer(rng, rows, features, classes, dtype):
    shapes = (rows, features), (classes, features), (classes,)
    return [torch.randn(shape, generator=rng).mul(features**-0.25).to(dtype) for shape in shapes]


def check_linear(operands, labels, upstream=None, **options):
    """Value within rounding of float64; gradients no further off than a layer whose logits are in the layer's dtype."""
    reduction = "mean" if upstream is None else "none"
    exact = [x.double().requires_grad_() for x in operands]
    naive = [x.nan_to_num(nan=0.0, neginf=-torch.inf).requires_grad_() for x in operands]  # rows that do not count
    leaves = [x.to(DEVICE).requires_grad_() for x in operands]
    common = {"reduction": reduction, **options}
    truth = linear_distill_loss(*exact, labels, implementation="reference", **common)
    logits = torch.nn.functional.linear(*naive)
    renamed = {("weight" if k == "example_weight" else k): v for k, v in common.items()}
    plain = distill_loss(logits, labels, implementation="reference", **renamed)
    there = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in common.items()}
    found = linear_distill_loss(*leaves, moved(labels), implementation="triton", **there)
    torch.testing.assert_close(found.detach().cpu().double(), truth.detach(), rtol=1e-5, atol=3e-6)
    upstream = torch.ones_like(truth) if upstream is None else upstream.double()
    slopes = torch.autograd.grad(found, leaves, upstream.to(DEVICE).float())
    true_slopes = torch.autograd.grad(truth, exact, upstream)
    plain_slopes = torch.autograd.grad(plain, naive, upstream.float())
    for slope, true, simple in zip(slopes, true_slopes, plain_slopes, strict=True):
        error = (slope.cpu().double() - true).abs().max()
        rounding = torch.finfo(slope.dtype).eps * true.abs().max()  # of the result, and of the tile's gradient
        assert error <= (simple.double() - true).abs().max() + rounding + 1e-8


@pytest.fixture
def _in_parts(monkeypatch):
    from distilbeam.kernels.linear_distillation import triton_backend

    monkeypatch.setattr(triton_backend, "ROWS_BYTES", 1)  # as few rows at once as there can be: 16


SPARSE = [
    ("truncated_kl", "top_k"),
    ("tail", "top_k"),
    ("renormalised", "top_k"),
    ("sampled", "sampled"),
    ("slam", "top_k"),
    ("ce", "hard"),
]


@pytest.mark.parametrize(
    ("objective", "kind", "dtype"),
    [
        *((objective, kind, torch.float32) for objective, kind in SPARSE),
        ("tail", "top_k", torch.bfloat16),
        ("slam", "top_k", torch.float16),
        *(
            (objective, "top_k", torch.float32)
            for objective in ("reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv")
        ),
        ("jsd", "top_k", torch.bfloat16),
    ],
)
def test_the_fused_layer(objective, kind, dtype, make_labels, rng):
    extra = {"accuracy": 0.7, "candidates": 3, "mixing": "forward"} if objective == "slam" else {}
    weight = torch.rand(ROWS, generator=rng)
    labels = make_labels(kind, ROWS, 300)
    check_linear(
        layer(rng, ROWS, 48, 300, dtype), labels, objective=objective, temperature=1.5, example_weight=weight, **extra
    )


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize(("objective", "reduction"), [("tail", "mean"), ("truncated_kl", "none")])
@pytest.mark.parametrize("rows", [ROWS, 40])
@pytest.mark.usefixtures("_in_parts")
def test_the_fused_layer_in_fewer_bits(form, objective, reduction, rows, make_labels, rng):
    operands, labels = layer(rng, rows, 80, 150, torch.float32), make_labels("top_k", rows, 150)
    upstream = torch.randn(rows, generator=rng) if reduction == "none" else None
    options = {"objective": objective, "temperature": 1.5, "reduction": reduction}
    truth, slopes, sizes = narrow_layer.exact(operands, form, labels, upstream, **options)
    leaves = [x.to(DEVICE).requires_grad_() for x in operands]
    found = linear_distill_loss(*leaves, moved(labels), precision=form, implementation="triton", **options)
    torch.testing.assert_close(found.detach().cpu().double(), truth, rtol=1e-5, atol=3e-6)
    above = None if upstream is None else upstream.to(DEVICE)
    for slope, true, size in zip(torch.autograd.grad(found, leaves, above), slopes, sizes, strict=True):
        assert slope.dtype == torch.float32
        # bfloat16 holds the logits' gradient and the other factor, each within 2^-8
        assert ((slope.cpu().double() - true).abs() <= (1.01 * 2**-7 + 1e-5) * size + 1e-7).all()


@pytest.mark.usefixtures("_in_parts")
def test_the_fused_layer_in_several_parts_with_masks_and_true_classes(make_labels, rng):
    rows = 40
    operands = layer(rng, rows, 33, 333, torch.float32)
    mask = torch.arange(rows) % 3 != 2
    operands[0][2] = torch.nan
    operands[2][320:] = -torch.inf
    hard = torch.tensor([3, -100, 5, 130, 7, -100, 300, 2]).repeat(5)
    labels = make_labels("top_k", rows, 300)
    upstream = torch.randn(rows, generator=rng)
    check_linear(operands, labels, upstream, objective="tail", mask=mask, hard=hard, hard_share=0.4)
    check_linear(operands, labels, objective="tail", mask=mask, temperature=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("_in_parts")
def test_the_fused_layer_in_several_parts_adds_up_in_float32(dtype, make_labels, rng):
    check_linear(layer(rng, 70, 48, 300, dtype), make_labels("top_k", 70, 300), objective="tail")


def test_the_fused_layer_without_bias_or_rows(make_labels, rng):
    hidden, weight, _ = (x.to(DEVICE).requires_grad_() for x in layer(rng, ROWS, 16, 50, torch.float32))
    labels = moved(make_labels("top_k", ROWS, 50))
    found = linear_distill_loss(hidden, weight, None, labels, objective="tail", implementation="triton")
    truth = linear_distill_loss(hidden, weight, None, labels, objective="tail", implementation="reference")
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    none = moved(make_labels("top_k", 0, 50))
    empty = linear_distill_loss(hidden[:0], weight, None, none, objective="tail", implementation="triton")
    assert float(empty.detach()) == 0
    assert torch.autograd.grad(empty, weight)[0].abs().max() == 0


def test_what_the_kernels_cannot_do_is_said(make_labels):
    with pytest.raises(NotImplementedError, match="triton: it computes in float32, the logits are float64"):
        distill_loss(
            torch.zeros(ROWS, 9, dtype=torch.float64, device=DEVICE),
            moved(make_labels("dense", ROWS, 9)),
            implementation="triton",
        )
    operands = [x.to(DEVICE) for x in layer(torch.Generator(), ROWS, 4, 9, torch.float32)]
    with pytest.raises(NotImplementedError, match="triton: dense labels hold a value for every class anyway"):
        linear_distill_loss(*operands, moved(make_labels("dense", ROWS, 9)), implementation="triton")
    wide, mixed = DenseLabels(torch.zeros(1, 5000, device=DEVICE)), {"objective": "slam", "accuracy": 0.7}
    with pytest.raises(NotImplementedError, match="dense labels of slam have at most 4,096 classes there, got 5,000"):
        distill_loss(torch.zeros(1, 5000, device=DEVICE), wide, implementation="triton", **mixed)
