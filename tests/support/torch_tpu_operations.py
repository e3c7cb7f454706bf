"""Check the operations that the losses register with torch, and take a training step through them.

Run as a program where torch_tpu is loaded: the operations are then its own, exported by JAX, and only their form for the
CPU is executed. Prints `sound` when every check passed.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from distilbeam.kernels import TopKLabels, linear_distill_loss
from distilbeam.kernels.distillation import pallas_backend as of_logits
from distilbeam.kernels.distillation.bucket_losses import scaled_losses
from distilbeam.kernels.distillation.terms import Options, make_terms

ROWS, FEATURES, CLASSES, KEPT = 32, 16, 200, 4


def examples() -> list[torch.Tensor]:
    """Make hidden states, a weight, a bias and kept classes."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,)
    layer = [torch.randn(shape, generator=generator) for shape in shapes]
    chosen = torch.rand(ROWS, CLASSES, generator=generator).topk(KEPT, dim=1).indices
    return [*layer, chosen.to(torch.int32)]


def check_registration() -> None:
    """Run torch's own checks of schema, shapes under tracing, and gradients, with fixed and with symbolic sizes."""
    classes = examples()[3]
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    torch.library.opcheck(of_logits.logit_buckets(), (logits, classes, 1.0))


def check_shapes_without_data() -> None:
    """Shapes and dtypes of results whose arguments have no data."""
    with FakeTensorMode() as mode:
        hidden, weight, _, classes = (mode.from_tensor(x) for x in examples())
        kept, *columns = of_logits.logit_buckets()(hidden.bfloat16() @ weight.bfloat16().T, classes, 1.0)
        assert (kept.shape, kept.dtype) == ((ROWS, KEPT), torch.float32)
        assert {(x.shape, x.dtype) for x in columns} == {((ROWS, 1), torch.float32)}


def check_a_traced_training_step() -> None:
    """A student of two layers, forward and backward in one graph that holds both operations, computes what it should."""
    _, weight, bias, classes = examples()
    generator = torch.Generator().manual_seed(1)
    hidden, inputs = (torch.randn(n, FEATURES, generator=generator) for n in (FEATURES, ROWS))
    logprobs = torch.randn(ROWS, CLASSES, generator=generator).log_softmax(1).gather(1, classes.long())
    # the labels' classes are looked at on a CPU, and only there; so their terms are made outside of the graph here
    labels = TopKLabels(logprobs, classes)
    term = make_terms(labels, ROWS, CLASSES, torch.float32, inputs.device, Options(objective="tail"))[0]

    def step(hidden, weight, bias, inputs):
        features = torch.tanh(inputs @ hidden)
        logits = torch.nn.functional.linear(features, weight, bias)
        loss = scaled_losses(lambda c, tau: of_logits.logit_buckets()(logits, c, tau), term).sum()
        return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

    arguments = [x.requires_grad_() for x in (hidden, weight, bias)] + [inputs]
    graph = make_fx(step)(*arguments)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert torch.ops.distilbeam.logit_buckets.default in called
    assert torch.ops.distilbeam.logit_gradient.default in called
    plain = linear_distill_loss(
        torch.tanh(inputs @ hidden), weight, bias, labels, objective="tail", implementation="reference"
    )
    expected = plain, *torch.autograd.grad(plain, arguments[:3])
    for found, wanted in zip(graph(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def main() -> None:
    """Run every check."""
    check_registration()
    check_shapes_without_data()
    check_a_traced_training_step()
    print("sound", "torch.tpu" if hasattr(torch, "tpu") else "torch")


if __name__ == "__main__":
    main()
