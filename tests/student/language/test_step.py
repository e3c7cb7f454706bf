"""The loss of blocks against the whole logits in float64: values, gradients, what counts and what does not."""

from __future__ import annotations

import numpy as np
import pytest
import small_language_trainings as small
import torch

from distilbeam.inputs.blocks import has_label
from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.language.network import build_language_model
from distilbeam.student.language.step import Positions, TokenStep, micro_batches

pytest.importorskip("transformers", reason="needs distilbeam[hf]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("step")
    for kind in ("top_k", "sampled"):
        small.write_blocks(directory / kind, directory / "tokenizer", rows=6, kind=kind)
    return directory


def parts_of(place, kind, **changes):
    """Give a network, its step, a batch of all blocks, and the specification."""
    blocks = TokenLabelDataset(place / kind, 6, 0, columns=())
    student, training = small.settings(place / "tokenizer", changes.pop("config", None), **changes)
    torch.manual_seed(3)
    network = build_language_model(student, load_tokenizer(place / "tokenizer", "tokenizer"))
    return network, TokenStep(network, training, blocks.spec), next(iter(blocks)), blocks.spec


def value_of(step, batch, normalizer):
    with torch.no_grad():
        return float(step(batch, normalizer))


def oracle(network, batch, spec, temperature, hard_share):
    """The mean loss over labelled positions, by loops over whole logits in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    labelled = has_label(batch["segment_ids"].numpy(), np.ones_like(batch["segment_ids"].numpy()))
    for b in range(len(batch["input_ids"])):
        segments = batch["segment_ids"][b]
        for segment in {int(s) for s in segments if s > 0}:  # each text alone: nothing can leak
            where = torch.nonzero(segments == segment)[:, 0]
            ids = batch["input_ids"][b][where].long()[None]
            logits = network.model(input_ids=ids).logits[0].double()[:, : spec.num_classes]
            for place, j in enumerate(where.tolist()):
                classes = batch["teacher_classes"][b, j]
                if classes[0] < 0:
                    continue
                assert labelled[b, j]
                count += 1
                there = classes >= 0
                kept, p1 = classes[there], batch["teacher_logprobs"][b, j][there].double().exp()
                if spec.kind == "top_k":  # the buckets at temperature 1, then softened and normalised
                    tail = batch["teacher_tail_logmass"][b, j].double().exp()[None]
                    p = torch.cat([p1, tail]) ** (1 / temperature)
                    p = p / p.sum()
                    rest = torch.logsumexp(
                        logits[place][[c for c in range(spec.num_classes) if c not in kept.tolist()]], 0
                    )
                    values = torch.cat([logits[place][kept], rest[None]])
                    q = (values / temperature).softmax(0)
                    soft = temperature**2 * (p * (p / q).log()).sum()
                else:
                    soft = (p1 * (p1.log() - logits[place].log_softmax(0)[kept])).sum()
                hard = -logits[place].log_softmax(0)[int(batch["input_ids"][b, j + 1])]
                total = total + (1 - hard_share) * soft + hard_share * hard
    return total / count, count


@pytest.mark.parametrize(
    ("kind", "temperature", "hard_share"),
    [("top_k", 1.0, 0.5), ("top_k", 2.0, 0.0), ("top_k", 2.0, 0.3), ("sampled", 1.0, 0.0)],
)
def test_value_and_gradient_are_those_of_the_whole_logits(place, kind, temperature, hard_share):
    network, step, batch, spec = parts_of(place, kind, temperature=temperature, hard_share=hard_share)
    expected, count = oracle(network, batch, spec, temperature, hard_share)
    expected.backward()
    wanted = {name: value.grad.clone() for name, value in network.named_parameters()}
    network.zero_grad()
    loss = step(batch, count)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in network.named_parameters():
        torch.testing.assert_close(value.grad, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_padding_prompts_and_further_rows_of_the_head_count_nothing(place):
    network, step, batch, spec = parts_of(place, "top_k")
    there = (batch["teacher_classes"][..., 0] >= 0).sum()
    changed = {name: value.clone() for name, value in batch.items()}
    changed["input_ids"][changed["segment_ids"] == 0] = 7
    changed["teacher_logprobs"][batch["teacher_classes"] < 0] = float("nan")
    assert value_of(step, changed, there) == pytest.approx(value_of(step, batch, there), abs=1e-7)
    wide, wide_step, _, _ = parts_of(place, "top_k", config={"vocab_size": spec.num_classes + 128})
    state = network.state_dict()
    wide.load_state_dict(
        {
            name: torch.cat([state[name], torch.full((128, state[name].shape[1]), 9.0)])
            if value.shape != state[name].shape
            else state[name]
            for name, value in wide.state_dict().items()
        }
    )
    assert value_of(wide_step, batch, there) == pytest.approx(value_of(step, batch, there), abs=1e-6)


def test_label_j_describes_token_j_plus_1():
    classes = torch.full((2, 4, 3), -1)
    classes[0, 1], classes[1, 0] = 5, 6
    batch = {"teacher_classes": classes, "input_ids": torch.arange(8).reshape(2, 4)}
    found = Positions.of(batch)
    assert found.places.tolist() == [1, 4]
    assert found.tokens.tolist() == [2, 5]
    some = Positions.of({**batch, "teacher_classes": classes[:, :2], "label_positions": torch.tensor([[0, 2], [1, 3]])})
    assert some.places.tolist() == [2, 5]
    assert some.tokens.tolist() == [3, 6]


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_micro_batches_add_up(place, parts):
    _, step, batch, _ = parts_of(place, "top_k")
    count = int((batch["teacher_classes"][..., 0] >= 0).sum())
    found = micro_batches(batch, parts, torch.device("cpu"))
    assert len(found) == parts
    assert sum(value_of(step, part, count) for part in found) == pytest.approx(value_of(step, batch, count), rel=1e-6)


def test_blocks_without_a_label_give_every_weight_a_gradient_of_0(place):
    network, step, batch, _ = parts_of(place, "top_k")
    masked = {**batch, "teacher_classes": torch.full_like(batch["teacher_classes"], -1)}
    step(masked, 1.0).backward()
    assert all(value.grad is not None and not value.grad.any() for value in network.parameters())


@pytest.mark.parametrize(("kind", "objective"), [("sampled", "tail"), ("sampled", "reverse_kl"), ("top_k", "sampled")])
def test_objectives_that_labels_cannot_serve_are_refused(place, kind, objective):
    with pytest.raises(ValueError, match="draws are unbiased for forward KL alone"):
        parts_of(place, kind, objective=objective)


def test_the_hard_losss_gradient_lives_beside_the_soft_one(place):
    gradients = []
    for share in (0.0, 0.5, 1.0):
        network, step, batch, _ = parts_of(place, "top_k", hard_share=share)
        step(batch, 1.0).backward()
        gradients.append(network.head.weight.grad.clone())
    torch.testing.assert_close(gradients[1], (gradients[0] + gradients[2]) / 2, rtol=1e-4, atol=1e-5)
    assert float((gradients[2] - gradients[0]).abs().max()) > 0.1
