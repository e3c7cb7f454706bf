"""A causal language model as the teacher of blocks: its labels are those of each text alone, whatever is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import log_softmax

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import blocks_of, write_model, write_tokenizer

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.inputs.config import InputError
from distilbeam.teacher.load import in_form, load_teacher
from distilbeam.teacher.predict import ask
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.tokens.causal_lm import CausalLMTeacher
from distilbeam.teacher.tokens.head import Halves

LENGTH = 24
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [3] * 4 + [0] * 3, [1] * 24, [1] * 2 + [2] * 22])


def teacher_of(folder: Path, **settings: Any) -> Any:
    return load_teacher({"kind": "causal_lm", "model": str(folder), "device": "cpu", **settings})


def spec_of(teacher: CausalLMTeacher, kind: Any = "top_k", k: int = 6, **fields: Any) -> SoftLabelSpec:
    given = {"unit": "token", "sequence_length": LENGTH, "tokenizer": teacher.tokenizer_fingerprint(), **fields}
    return SoftLabelSpec(teacher.num_classes, kind, k, teacher=teacher.fingerprint(), **given)


def batch_of(blocks: pa.Table) -> pa.RecordBatch:
    return blocks.combine_chunks().to_batches()[0]


def alone(folder: Path, blocks: pa.Table, classes: int) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """The log-probabilities at each position by transformers' own forward pass of each text on its own, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    found = {}
    for row, block in enumerate(blocks.to_pylist()):
        segments = np.array(block["segment_ids"])
        for segment in set(segments.tolist()) - {0}:
            at = np.flatnonzero(segments == segment)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(block["input_ids"])[at][None]).logits[0, :, :classes]
            for place, logprobs in zip(at[:-1], log_softmax(logits.numpy(), axis=1)[:-1], strict=True):
                found[row, int(place)] = logprobs
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def test_labels_are_those_of_each_text_alone(model: Path) -> None:
    teacher, blocks = teacher_of(model), blocks_of(SEGMENTS)
    assert (teacher.keeps_apart_by, teacher._halves.are_two) == ("positions", True)
    labels = teacher.token_labels(batch_of(blocks), spec_of(teacher))
    expected = alone(model, blocks, teacher.num_classes)
    assert set(zip(*np.nonzero(labels.labelled), strict=True)) == set(expected)
    ids = np.array(blocks["input_ids"].to_pylist())
    for (row, place), logprobs in expected.items():
        order = np.argsort(-logprobs)[:6]
        assert labels.classes[row, place].tolist() == order.tolist()
        np.testing.assert_allclose(labels.logprobs[row, place], logprobs[order], atol=2e-5)
        np.testing.assert_allclose(labels.token_logprob[row, place], logprobs[ids[row, place + 1]], atol=2e-5)
        np.testing.assert_allclose(
            np.exp(labels.tail_logmass[row, place]), 1 - np.exp(logprobs[order]).sum(), atol=1e-5
        )


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_changing_one_text_changes_no_label_of_another(model: Path, kind: str) -> None:
    teacher = teacher_of(model)
    one, other = blocks_of(SEGMENTS[:1], 0), blocks_of(SEGMENTS[:1], 1)
    ids = np.array(one["input_ids"].to_pylist())
    ids[0, :9] = np.array(other["input_ids"].to_pylist())[0, :9]
    values = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1), pa.int32()), type=one.schema.field(1).type)
    changed = one.set_column(1, one.schema.field(1), values)
    before, after = (teacher.token_labels(batch_of(b), spec_of(teacher, kind)) for b in (one, changed))
    np.testing.assert_array_equal(before.classes[0, 9:], after.classes[0, 9:])
    np.testing.assert_array_equal(before.logprobs[0, 9:], after.logprobs[0, 9:])
    assert (before.token_logprob[0, :8] != after.token_logprob[0, :8]).all()


def test_the_batch_changes_no_label_and_draws_follow_the_id(model: Path) -> None:
    blocks = blocks_of(np.repeat(SEGMENTS, 3, axis=0))
    small, large = teacher_of(model, batch_tokens=1), teacher_of(model)
    for kind in ("top_k", "sampled"):
        spec = spec_of(large, kind, 8)
        one = small.token_labels(batch_of(blocks.slice(2, 5)), spec)
        many = large.token_labels(batch_of(blocks), spec)
        np.testing.assert_array_equal(one.classes, many.classes[2:7])
        np.testing.assert_allclose(one.logprobs, many.logprobs[2:7], atol=1e-5)
    named = blocks.set_column(0, "example_id", pa.array(["same"] * len(blocks)))
    twice = batch_of(pa.concat_tables([named.slice(0, 1), named.slice(0, 1), blocks.slice(0, 1)]))
    drawn = large.token_labels(twice, spec_of(large, "sampled", 8))
    np.testing.assert_array_equal(drawn.classes[0], drawn.classes[1])
    assert (drawn.classes[0] != drawn.classes[2]).any()
    other = large.token_labels(twice, spec_of(large, "sampled", 8, temperature=1.0 + 1e-9))  # another meaning
    assert (drawn.classes[0] != other.classes[0]).any()


def test_a_model_that_counts_shows_every_position_in_its_place(tmp_path: Path) -> None:
    """Of token c it predicts c + 1: a label that is off by one shows anywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(tmp_path)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=304,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    counting = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in counting.named_parameters():
            if "norm" not in name:
                weight.zero_()
        counting.model.embed_tokens.weight[:, :300] = torch.eye(300)
        counting.lm_head.weight[1:, :300] = 2 * torch.eye(300)[:-1]
    counting.save_pretrained(tmp_path)
    ids = np.arange(LENGTH)[None] + np.array([[5], [40], [200]])
    blocks = blocks_of(SEGMENTS)
    values = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1), pa.int32()), type=blocks.schema.field(1).type)
    blocks = blocks.set_column(1, blocks.schema.field(1), values)
    teacher = teacher_of(tmp_path)
    labels = teacher.token_labels(batch_of(blocks), spec_of(teacher))
    at = labels.labelled
    assert at.sum() == 8 + 7 + 3 + 23 + 1 + 21
    np.testing.assert_array_equal(labels.classes[at][:, 0], (ids + 1)[at])
    assert (labels.token_logprob[at] > -1e-3).all()
    assert (labels.classes[~at] == -1).all()
    assert (labels.token_logprob[~at] == 0).all()


def test_a_padded_head_is_cut_to_the_tokenizer(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    padded = AutoModelForCausalLM.from_pretrained(model)
    padded.resize_token_embeddings(428, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[300:] = 3 * padded.lm_head.weight[:128]
    write_tokenizer(tmp_path)
    padded.save_pretrained(tmp_path)
    one, two = teacher_of(model), teacher_of(tmp_path)
    assert one.num_classes == two.num_classes == 300
    for kind in ("top_k", "sampled"):
        spec = spec_of(one, kind)
        labels = [teacher.token_labels(batch_of(blocks_of(SEGMENTS)), spec) for teacher in (one, two)]
        np.testing.assert_array_equal(labels[0].classes, labels[1].classes)
        np.testing.assert_allclose(labels[0].token_logprob, labels[1].token_logprob, atol=1e-5)


def test_what_a_head_does_to_logits_is_done(tmp_path: Path) -> None:
    """Gemma 2 caps its logits behind the last layer; with a cap of 1 a label without it would be far off."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    write_tokenizer(tmp_path)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Gemma2Config(
        vocab_size=300, num_key_value_heads=2, final_logit_softcapping=1.0, initializer_range=0.5, **shape
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    teacher, blocks = teacher_of(tmp_path), blocks_of(SEGMENTS)
    assert teacher._halves.are_two
    labels = teacher.token_labels(batch_of(blocks), spec_of(teacher))
    for (row, place), logprobs in alone(tmp_path, blocks, 300).items():
        assert logprobs.max() - logprobs.min() < 2.01
        np.testing.assert_allclose(labels.logprobs[row, place], np.sort(logprobs)[::-1][:6], atol=1e-4)


def test_a_model_that_cannot_be_halved_is_run_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, blocks = teacher_of(model), blocks_of(SEGMENTS)
    expected = teacher.token_labels(batch_of(blocks), spec_of(teacher))
    monkeypatch.setattr(Halves, "logits", lambda self, hidden: hidden * 2 if self._layers is not None else hidden)
    whole = teacher_of(model)
    assert not whole._halves.are_two
    labels = whole.token_labels(batch_of(blocks), spec_of(teacher))
    np.testing.assert_array_equal(labels.classes, expected.classes)
    np.testing.assert_allclose(labels.logprobs, expected.logprobs, atol=1e-5)


def test_a_block_that_is_no_number_or_no_text_is_left_out_alone(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(model)
    blocks = blocks_of(SEGMENTS)
    ids = np.array(blocks["input_ids"].to_pylist())
    only = next(int(t) for t in ids[1] if t not in ids[0] and t not in ids[2])
    with torch.no_grad():
        broken.model.embed_tokens.weight[only] = torch.nan
    write_tokenizer(tmp_path)
    broken.save_pretrained(tmp_path)
    form = {"kind": "top_k", "k": 4, "temperature": 1.0, "storage": "float32", "sequence_length": LENGTH, "carried": ()}
    answering: Any = load_teacher({"kind": "causal_lm", "model": str(tmp_path), "device": "cpu"}, form=form)
    answers = ask(answering, batch_of(blocks), answering.spec.answer_width)
    assert answers.ok.tolist() == [True, False, True]
    assert [error.stage for error in answers.errors] == ["answer"]
    beyond = ids.copy()
    beyond[2, 3] = 300
    values = pa.FixedSizeListArray.from_arrays(
        pa.array(beyond.reshape(-1), pa.int32()), type=blocks.schema.field(1).type
    )
    answers = ask(
        answering, batch_of(blocks.set_column(1, blocks.schema.field(1), values)), answering.spec.answer_width
    )
    assert answers.ok.tolist() == [True, False, False]
    assert [error.stage for error in answers.errors] == ["answer", "input"]
    assert "must hold ids from 0 to 299, which the teacher's tokenizer can emit, got 300" in answers.errors[1].error
    labels = TokenLabels.unpack(answers.logits[:1], answering.spec)
    assert labels.labelled.sum() == 8 + 7 + 3


def test_longer_blocks_smaller_heads_and_other_models_are_refused(model: Path, tmp_path: Path) -> None:
    form = {"kind": "top_k", "k": 4, "temperature": 1.0, "storage": "float32", "sequence_length": 129, "carried": ()}
    with pytest.raises(
        ValueError, match=r"blocks have 129 tokens, the teacher reads at most 128; .*--sequence-length 128$"
    ):
        load_teacher({"kind": "causal_lm", "model": str(model), "device": "cpu"}, form=form)
    write_model(tmp_path / "small", vocabulary=200)
    with pytest.raises(ValueError, match="has 200 outputs, fewer than the 300 ids of its tokenizer"):
        teacher_of(tmp_path / "small")
    with pytest.raises(ValueError, match=r"must be a folder with config.json and safetensors on this disk"):
        teacher_of(tmp_path / "nowhere")
    write_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no causal language model with safetensors"):
        teacher_of(tmp_path / "empty")
    teacher = teacher_of(model)
    with pytest.raises(InputError, match="must hold ids from 0 to 299"):
        teacher.token_labels(batch_of(blocks_of(SEGMENTS, vocabulary=400)), spec_of(teacher))


def test_a_model_that_sees_what_follows_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Halves.hidden

    def backwards(self: Halves, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        return hidden(self, ids.flip(1), *others).flip(1)

    monkeypatch.setattr(Halves, "hidden", backwards)
    with pytest.raises(ValueError, match=r"^teacher.model: .* lets a text see others, or what follows"):
        teacher_of(model)


def test_the_fingerprint_is_of_the_files_and_the_type(model: Path, tmp_path: Path) -> None:
    one, two = teacher_of(model), teacher_of(model, dtype="bfloat16")
    assert one.fingerprint() == teacher_of(model, batch_tokens=64).fingerprint() != two.fingerprint()
    assert one.fingerprint() != teacher_of(write_model(tmp_path, seed=1)).fingerprint()
    labels = two.token_labels(batch_of(blocks_of(SEGMENTS)), spec_of(two))
    assert np.isfinite(labels.logprobs).all()
    two.close()
    with pytest.raises(RuntimeError, match="the teacher was closed"):
        two.token_labels(batch_of(blocks_of(SEGMENTS)), spec_of(one))


def test_a_line_is_completed_as_transformers_does(tmp_path: Path) -> None:
    import transformers

    write_model(tmp_path)
    teacher = teacher_of(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    given = "the student reads"
    ids = tokenizer(given, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0]
    if tokenizer.eos_token_id in expected.tolist():
        expected = expected[: expected.tolist().index(tokenizer.eos_token_id)]
    assert teacher.complete(given, 6) == tokenizer.decode(expected)
    assert teacher.complete(given, 0) == given


def test_a_teacher_that_answers_in_two_forms_is_loaded_once(tmp_path: Path) -> None:
    write_model(tmp_path)
    form = {"kind": "top_k", "k": 4, "temperature": 1.0, "storage": "float32", "sequence_length": 16}
    form["carried"] = BLOCK_COLUMNS
    first: Any = load_teacher({"kind": "causal_lm", "model": str(tmp_path), "device": "cpu"}, form=form)
    second: Any = in_form(first, {**form, "kind": "sampled", "k": 9})
    assert second.teacher is first.teacher
    assert (first.spec.kind, first.spec.k, second.spec.kind, second.spec.k) == ("top_k", 4, "sampled", 9)
    first.close()
    second.close()  # a second time does nothing
