"""The networks against formulas, hand-set weights and torch's own layers; what compilers and exporters make of them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pydantic
import pytest
import torch
from torch import nn

from distilbeam.inputs.config import make_input
from distilbeam.student.networks.build import build_student, count_parameters
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.laurel import LaurelResidual
from distilbeam.student.networks.residual import Replacement

NUMBERS = {"columns": ["x"]}
IDS = {"kind": "tokens", "columns": ["x"], "vocabulary": 30, "max_length": 7, "pad_id": 2}
KINDS = {
    "mlp": {"hidden": (6, 6, 6), "input": NUMBERS},
    "cnn": {"width": 0.1, "input": NUMBERS},
    "resnet": {"depth": 14, "width": 0.25, "input": NUMBERS},
    "text": {"dim": 6, "hidden": (6, 6, 6), "input": IDS},
    "transformer": {"dim": 8, "heads": 2, "layers": 2, "input": IDS},
}
SHAPES = {"mlp": (5,), "cnn": (3, 8, 8), "resnet": (3, 9, 8), "text": (7,), "transformer": (7,)}
VARIANTS = ["+".join(parts) for size in (1, 2, 3) for parts in itertools.combinations(("rw", "lr", "pa"), size)]


def student(kind, **settings):
    torch.manual_seed(0)
    return build_student(StudentConfig(kind=kind, **{**KINDS[kind], **settings}), SHAPES[kind], 4)


def examples(kind, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if "vocabulary" in KINDS[kind]["input"]:
        return torch.randint(0, 30, (rows, *SHAPES[kind]), generator=generator)
    return torch.randn(rows, *SHAPES[kind], generator=generator)


def copied(target, source):
    """Give one network the weights that another has under the same names."""
    target.load_state_dict(source.state_dict(), strict=False)
    return target


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_the_resnet_has_the_size_of_the_papers_table(depth, parameters):
    """He et al., table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million."""
    network = build_student(StudentConfig(kind="resnet", depth=depth, input=NUMBERS), (3, 32, 32), 10)
    assert count_parameters(network) == parameters
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) + 1 == depth


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(8, 0.25), (14, 1.3)])
def test_the_resnets_parameters_by_formula(separable, depth, width):
    network = build_student(
        StudentConfig(kind="resnet", depth=depth, width=width, separable=separable, input=NUMBERS), (1, 8, 8), 7
    )
    a, b, c = round(16 * width), round(32 * width), round(64 * width)
    n = (depth - 2) // 6
    pairs = [(a, a)] * 2 * n + [(a, b)] + [(b, b)] * (2 * n - 1) + [(b, c)] + [(c, c)] * (2 * n - 1)
    convolutions = sum(9 * i + i * o if separable else 9 * i * o for i, o in pairs)
    norms = 2 * a + sum(2 * o for _, o in pairs)
    assert count_parameters(network) == 9 * a + convolutions + norms + (c + 1) * 7


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_parameters_of_texts_by_formula(width):
    config = StudentConfig(kind="text", dim=10, hidden=(6, 4), width=width, input=IDS)
    d, h, g = round(10 * width), round(6 * width), round(4 * width)
    assert count_parameters(build_student(config, (7,), 5)) == 30 * d + (d + 1) * h + (h + 1) * g + (g + 1) * 5
    config = StudentConfig(kind="transformer", dim=8, heads=2, layers=3, feedforward=2, width=width, input=IDS)
    d = 2 * round(4 * width)
    f = 2 * d
    expected = (30 + 7) * d + 3 * (4 * d * d + 2 * d * f + 9 * d + f) + 2 * d + (d + 1) * 5
    assert count_parameters(build_student(config, (7,), 5)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_learned_residuals_are_plain_at_step_0_and_all_parameters_learn(kind, variant):
    learned = student(kind, residual=f"laurel-{variant}", rank=2, history="low-rank").eval()
    plain = copied(student(kind, residual="plain").eval(), learned)
    x = examples(kind, 5)
    torch.testing.assert_close(learned(x), plain(x), rtol=1e-5, atol=1e-6)
    learned(x).square().sum().backward()
    # data-parallel training waits for the gradient of every parameter
    assert [name for name, p in learned.named_parameters() if p.grad is None] == []
    assert not torch.equal(plain(x), copied(student(kind, residual="none").eval(), learned)(x))


@pytest.mark.parametrize(("variant", "per_layer"), [("rw", 2), ("lr", 2 * 3 * 4), ("rw+lr", 2 + 2 * 3 * 4)])
def test_learned_residuals_of_a_resnet_are_counted(variant, per_layer):
    """Width 0.25 has 4, 8 and 16 channels; depth 14 has two blocks a stage, one of them widening in two stages."""
    extra = count_parameters(student("resnet", residual=f"laurel-{variant}", rank=3)) - count_parameters(
        student("resnet", residual="plain")
    )
    channels = [4, 4, 8, 16]
    by_variant = {"rw": 2 * 4, "lr": sum(2 * 3 * c for c in channels), "rw+lr": 8 + sum(2 * 3 * c for c in channels)}
    assert extra == by_variant[variant]
    assert count_parameters(LaurelResidual(4, variant, rank=3)) == per_layer


def test_previous_residuals_have_a_weight_each_up_to_the_number_there_are():
    network = student("transformer", layers=3, residual="laurel-pa", previous=3)
    assert [0 if r.gamma is None else len(r.gamma) for r in network.residuals] == [0, 1, 2, 3, 3, 3]
    network = student("resnet", depth=26, residual="laurel-pa", previous=2)
    sizes = [0 if r.gamma is None else len(r.gamma) for r in network.modules() if isinstance(r, LaurelResidual)]
    assert sizes == [0, 1, 2, 2, 0, 1, 2, 0, 1, 2]  # a widening block starts anew
    assert isinstance(student("resnet", residual="none").blocks[0].residual, Replacement)


def test_a_resnets_shortcuts_keep_every_second_pixel_and_pad_channels():
    network = student("resnet", depth=8).eval()
    for block in network.blocks:
        block.layers[-1].weight.data.zero_()  # the last norm of a block: nothing but shortcuts is left
    image = torch.randn(1, 3, 9, 8)
    stem = torch.relu(network.norm(network.stem(image)))
    halved = nn.functional.pad(stem[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    quartered = nn.functional.pad(halved[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    torch.testing.assert_close(network(image), network.head(quartered.mean((2, 3))))


@pytest.mark.parametrize("kind", ["cnn", "resnet", "transformer"])
def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(kind):
    network, x = student(kind, residual="plain"), examples(kind, 6)
    with torch.no_grad():
        if kind != "transformer":
            network.train()(examples(kind, 32, seed=3))  # running statistics other than those at the start
        network.eval()
        alone = torch.cat([network(row[None]) for row in x])
        torch.testing.assert_close(network(x), alone, rtol=1e-5, atol=1e-6)


def test_the_transformer_is_torchs_encoder():
    ours = student("transformer").eval()
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(2)
    ).eval()
    for i, theirs in enumerate(layers):
        attention, network = ours.sublayers[2 * i], ours.sublayers[2 * i + 1]
        theirs.self_attn.in_proj_weight.data = attention.queries_keys_values.weight.data
        theirs.self_attn.in_proj_bias.data = attention.queries_keys_values.bias.data
        for target, source in (
            (theirs.self_attn.out_proj, attention.out),
            (theirs.linear1, network.up),
            (theirs.linear2, network.down),
            (theirs.norm1, ours.norms[2 * i]),
            (theirs.norm2, ours.norms[2 * i + 1]),
        ):
            target.load_state_dict(source.state_dict())
    ids = examples("transformer", 6)
    ids[:, 0], ids[1, 4:], ids[2, 1:] = 5, 2, 2
    padding = ids == 2
    h = ours.tokens(ids) + ours.positions
    for theirs in layers:
        h = theirs(h, src_key_padding_mask=padding)
    kept = (~padding)[..., None]
    expected = ours.head((ours.norm(h) * kept).sum(1) / kept.sum(1))
    torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["text", "transformer"])
def test_padding_is_not_read(kind):
    network = student(kind).eval()
    ids = torch.tensor([[4, 9, 1, 2, 2, 2, 2]])
    before = network(ids)
    table = network.embedding if kind == "text" else network.tokens
    if kind == "transformer":
        network.positions.data[3:] += 5.0
        table.weight.data[2] += 5.0
    else:
        assert torch.equal(table.weight[2], torch.zeros(6))
    torch.testing.assert_close(network(ids), before)
    empty = torch.full((1, 7), 2)
    assert torch.isfinite(network(empty)).all()


def test_a_bag_is_the_mean_of_its_embeddings():
    network = student("text", hidden=()).eval()
    ids = torch.tensor([[4, 4, 1, 2, 2, 2, 2], [2] * 7])
    mean = (2 * network.embedding.weight[4] + network.embedding.weight[1]) / 3
    torch.testing.assert_close(network(ids), network.layers.head(torch.stack([mean, torch.zeros(6)])))


def test_both_forms_of_hashed_ngrams_can_be_learnt_from():
    """Two bags of words that differ in one word: either network tells them apart after a few steps."""
    batch = pa.record_batch({"t": ["good film", "bad film"] * 4})
    truth = torch.tensor([0, 1] * 4)
    for form in ("vector", "ids"):
        described = {"kind": "text", "columns": ["t"], "buckets": 64, "max_length": 8, "ngram_form": form}
        config = StudentConfig(kind="text", dim=8, hidden=(8,), input=described)
        x = torch.from_numpy(make_input(config.input)(batch))
        torch.manual_seed(0)
        network = build_student(config, tuple(x.shape[1:]), 2)
        optimizer = torch.optim.Adam(network.parameters(), 0.05)
        for _ in range(40):
            loss = nn.functional.cross_entropy(network(x), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(loss.detach()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_compilers_and_exporters_take_the_network_whole_at_any_batch_size(kind):
    network = student(kind, residual="laurel-rw+lr+pa", rank=2).eval()
    x, more = examples(kind, 3), examples(kind, 5, seed=2)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.testing.assert_close(program.module()(more), network(more))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), network(x))


def test_inputs_that_do_not_suit_a_network_are_refused():
    for kind, shape, message in (
        ("resnet", (8, 8), r"a resnet needs inputs of shape \[channels, height, width\], got \[8, 8\]"),
        ("text", (3, 4), r"a text network needs ids or vectors of one dimension, got inputs of shape \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            build_student(StudentConfig(kind=kind, input=NUMBERS), shape, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "resnet", "depth": 18}, "depth of a resnet must be 6n \\+ 2, such as 20, .*, got 18"),
        ({"kind": "transformer", "dim": 10, "input": IDS}, "dim must be a multiple of the 4 heads, got 10"),
        ({"kind": "transformer"}, "a transformer needs token ids in their order"),
        (
            {"kind": "transformer", "input": {"kind": "text", "columns": ["x"], "ngram_form": "ids"}},
            "a transformer needs token ids in their order",
        ),
        ({"kind": "mlp", "input": IDS}, "kind 'mlp' needs numbers, its input gives ids; kind 'text' embeds them"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        StudentConfig(**{"input": NUMBERS, **settings})


def test_networks_known_by_their_residuals_have_them_unless_told_otherwise():
    assert StudentConfig(kind="resnet", input=NUMBERS).residual == "plain"
    assert StudentConfig(kind="resnet", residual="none", input=NUMBERS).residual == "none"
    assert StudentConfig(kind="mlp", input=NUMBERS).residual == "none"
    again = StudentConfig.model_validate(StudentConfig(kind="transformer", input=IDS).model_dump())
    assert again.residual == "plain"


def test_width_scales_every_network():
    sizes = {
        kind: [count_parameters(student(kind, width=width)) for width in (0.5, 1.0, 2.0)]
        for kind in ("mlp", "cnn", "resnet", "text", "transformer")
    }
    assert all(np.all(np.diff(found) > 0) for found in sizes.values())
