"""Every backend of the losses against a float64 oracle, over labels that a codec writes and people do write.

In Triton's interpreter this file tests the Triton kernels (test_triton_interpreted.py starts it).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from loss_cases import OTHER_DIVERGENCES, LossCase, exact, random_case
from triton_device import DEVICE, INTERPRETED

from distilbeam.kernels import DenseLabels, HardLabels, distill_loss, linear_distill_loss
from distilbeam.kernels.linear_distillation import chunked as by_chunks
from distilbeam.kernels.linear_distillation import products

# -inf - -inf, and products with infinities, in lanes that are masked
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
BACKENDS = ["triton"] if INTERPRETED else ["chunked", "reference", *(["triton"] if torch.cuda.is_available() else [])]
FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
PER_TEST = 25
ON_A_GPU = ("triton", "one_kernel", "two_kernels")


def seeds(few, many):
    """A few blocks of cases, and many more for those who ask."""
    return [pytest.param(n, marks=() if n < few else pytest.mark.exhaustive) for n in range(many)]


def moved(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, HardLabels):
        return HardLabels(x.classes.to(device), x.ignore_index)
    return (
        type(x)(**{n: None if v is None else v.to(device) for n, v in vars(x).items()}) if hasattr(x, "logprobs") else x
    )


def check(case, found, leaves, truth, exact_leaves, message, roundings=1):
    """Value and gradients within a few roundings of what the numbers in between are as large as."""
    upstream = torch.linspace(0.5, 2, truth.numel(), dtype=torch.float64).reshape(truth.shape)
    z = case.logits.double()
    z = z.masked_fill(~z.isfinite(), 0)
    temperature = case.options["temperature"]
    wide = float((z.amax(1) - z.amin(1)).max()) if z.numel() else 0.0
    spread = (wide + 8) / min(1.0, temperature)  # logarithms of this size are off by half a unit in their last place
    if case.options["objective"] in OTHER_DIVERGENCES:  # as large are the logarithms of their targets
        spread += 88
    weight = case.options.get("weight")
    heaviest = 1.0 if weight is None or not len(weight) else max(1.0, float(weight.max()))
    normalizer = case.options.get("normalizer") if case.options["reduction"] == "mean" else None
    size = 2 * heaviest * max(1.0, temperature) ** 2 / (normalizer or 1.0)
    if (
        "accuracy" in case.options
    ):  # where the mixture is nothing but the teacher's errors, terms of 1 / accuracy cancel
        size /= max(1e-7, float(torch.as_tensor(case.options["accuracy"]).min())) if len(case.logits) else 1.0
    eps = roundings * {torch.float64: 1e-14}.get(leaves[0].dtype, 1.2e-7)
    torch.testing.assert_close(
        found.detach().cpu().double(),
        truth.detach(),
        rtol=30 * eps,
        atol=3 * eps * spread * size,
        msg=f"value {message}",
    )
    slopes = torch.autograd.grad(found, leaves, upstream.to(device=found.device, dtype=found.dtype), allow_unused=True)
    true = torch.autograd.grad(truth, exact_leaves, upstream, allow_unused=True) if truth.requires_grad else [None] * 3
    for slope, best, leaf in zip(slopes, true, exact_leaves, strict=False):
        assert slope is not None
        best = torch.zeros_like(leaf) if best is None else best
        stored = torch.finfo(slope.dtype).eps if slope.dtype.itemsize == 2 else 0.0
        tiny = 6e-8 * size if slope.dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            slope.cpu().double(),
            best,
            rtol=2 * stored + 30 * eps,
            atol=eps * spread * size + tiny,
            msg=lambda m: f"gradient {message}: {m}",
        )


def compare(case, implementation, message):
    leaf = moved(case.logits, DEVICE if implementation in ON_A_GPU else "cpu").detach().requires_grad_()
    options = {n: moved(v, leaf.device) for n, v in case.options.items()}
    exact_leaf = case.logits.double().detach().requires_grad_()
    truth = exact(case, exact_leaf)
    found = distill_loss(leaf, moved(case.labels, leaf.device), implementation=implementation, **options)
    check(case, found, [leaf], truth, [exact_leaf], message)
    if implementation == "chunked":
        with torch.no_grad():
            alone = distill_loss(leaf, case.labels, implementation=implementation, **options)
        torch.testing.assert_close(alone, found.detach())


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("block", seeds(1 if INTERPRETED else 12, 100))
def test_losses_of_logits(block, implementation):
    dtypes = FLOATS if implementation == "triton" else (*FLOATS, torch.float64)
    for seed in range(PER_TEST * block, PER_TEST * (block + 1)):
        compare(random_case(seed, dtypes), implementation, f"of {implementation}, case {seed}")


if not INTERPRETED:

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
    @pytest.mark.parametrize("block", seeds(1, 20))
    def test_losses_of_logits_in_pallas(block, monkeypatch):
        monkeypatch.setenv("DISTILBEAM_PALLAS_INTERPRET", "1")
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        for seed in range(PER_TEST * block, PER_TEST * (block + 1)):
            # the kernels are compiled for every size anew
            case = random_case(seed, (torch.float32, torch.bfloat16), ("top_k", "sampled", "hard"), sizes=(9, 33, 4))
            compare(case, "pallas", f"of pallas, case {seed}")

    @pytest.mark.parametrize("implementation", ["chunked", "reference"])
    @pytest.mark.parametrize("order", ["rows", "classes"])
    @pytest.mark.parametrize("block", seeds(2, 50))
    def test_losses_of_a_last_layer(block, order, implementation, monkeypatch):
        monkeypatch.setattr(by_chunks, "FEWEST_ROWS", 1 if order == "rows" else 10**9)
        monkeypatch.setattr(by_chunks, "BUFFER_ELEMENTS", 300)
        if block % 2:  # both libraries' products
            monkeypatch.setattr(products, "LEAST", 0)
        for seed in range(PER_TEST * block, PER_TEST * (block + 1)):
            case = random_case(seed, (torch.float32,), ("dense", "top_k", "sampled", "hard"))
            compare_layer(case, implementation, f"of {implementation} by {order}, case {seed}")


@pytest.mark.skipif("triton" not in BACKENDS, reason="neither a CUDA device nor the interpreter")
@pytest.mark.parametrize("implementation", ["one_kernel", "two_kernels"])
@pytest.mark.parametrize("block", seeds(1 if INTERPRETED else 3, 60))
def test_losses_of_logits_whose_labels_the_kernel_prepares(block, implementation):
    """Rows of any length and stride: most do not begin on 16 bytes."""
    tried = 0
    dtypes = (torch.bfloat16, torch.float16) if implementation == "one_kernel" else FLOATS
    kinds = ("dense", "top_k", "sampled", "hard") if implementation == "one_kernel" else ("top_k", "sampled", "hard")
    for seed in range(PER_TEST * block, PER_TEST * (block + 1)):
        case = random_case(seed, dtypes, kinds)
        hard, objective = isinstance(case.labels, HardLabels), case.options["objective"]
        if "hard" in case.options or (objective in ("slam", "renormalised") and not hard):
            continue
        if objective in OTHER_DIVERGENCES and isinstance(case.labels, DenseLabels):
            continue
        compare(case, implementation, f"of {implementation}, case {seed}")
        tried += 1
    assert tried >= 3


@pytest.mark.skipif("triton" not in BACKENDS, reason="neither a CUDA device nor the interpreter")
@pytest.mark.parametrize("parts", ["whole", "in parts"])
@pytest.mark.parametrize("implementation", ["triton", "in_place"])
@pytest.mark.parametrize("block", seeds(1, 50))
def test_losses_of_a_last_layer_in_triton(block, implementation, parts, monkeypatch):
    from distilbeam.kernels.linear_distillation import triton_backend

    monkeypatch.setattr(triton_backend, "ROWS_BYTES", 1 if parts == "in parts" else 1 << 30)
    tried = 0
    for seed in range(PER_TEST * block, PER_TEST * (block + 1)):
        case = random_case(seed, (torch.float32,), ("top_k", "sampled", "hard"))
        hard = isinstance(case.labels, HardLabels)
        mixed = "hard" in case.options or (case.options["objective"] in ("slam", "renormalised") and not hard)
        full = not hard and case.labels.classes.shape[1] == case.logits.shape[1]  # there may be no other classes
        if implementation == "in_place" and (mixed or full):
            continue
        compare_layer(case, implementation, f"of {implementation}, case {seed}")
        tried += 1
    assert tried >= 2


def compare_layer(case, implementation, message):
    generator = torch.Generator().manual_seed(len(case.logits))
    (rows, classes), features = case.logits.shape, 6
    layer = [torch.randn(shape, generator=generator) for shape in ((rows, features), (classes, features), (classes,))]
    layer[2] += 50  # a common offset
    layer[0][~torch.from_numpy(case.count)] = torch.nan
    if narrow := implementation == "in_place":
        layer = [x.bfloat16() for x in layer]
    device = DEVICE if implementation in ("triton", "in_place") else "cpu"
    leaves = [x.to(device).requires_grad_() for x in layer]
    exact_leaves = [x.double().requires_grad_() for x in layer]
    logits = torch.nn.functional.linear(exact_leaves[0].nan_to_num(0), *exact_leaves[1:])
    truth = exact(case, logits)
    options = {n: moved(v, device) for n, v in case.options.items()}
    options["example_weight"] = options.pop("weight", None)
    found = linear_distill_loss(*leaves, moved(case.labels, device), implementation=implementation, **options)
    z = LossCase(logits.detach(), case.labels, case.options)
    # logits in bfloat16, offset and all, are off by 2^-9 of what they are as large as
    check(z, found, leaves, truth, exact_leaves, message, roundings=40 if not narrow else 40 * 2**15)
