"""Texts of a block are kept apart: by positions, by a mask, or the model is refused; what fits labels and what does not."""

from __future__ import annotations

import pytest
import small_language_trainings as small
import torch
from language_models import write_model

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.network import CausalLm, build_language_model, positions, require_suits

transformers = pytest.importorskip("transformers", reason="needs distilbeam[hf]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a Llama with its tokenizer."""
    return write_model(tmp_path_factory.mktemp("network") / "llama")


def built(folder, **config):
    torch.manual_seed(0)
    student = LanguageModelConfig(config={**small.LLAMA, **config}, tokenizer=str(folder))
    return build_language_model(student, load_tokenizer(folder, "tokenizer")).eval()


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}


@pytest.mark.parametrize("config", [small.LLAMA, {"model_type": "gpt2", **GPT2}], ids=["llama", "gpt2"])
def test_a_text_changes_nothing_of_the_next(folder, config):
    torch.manual_seed(0)
    student = LanguageModelConfig(config=config, tokenizer=str(folder))
    network = build_language_model(student, load_tokenizer(folder, "tokenizer")).eval()
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
    first = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 0]])
    second = first.clone()
    second[0, :4] = torch.tensor([99, 98, 97, 96])
    with torch.no_grad():
        a, b = network.hidden(first, segments), network.hidden(second, segments)
        alone = network.model(input_ids=first[:, 4:9]).logits
    torch.testing.assert_close(a[:, 4:9], b[:, 4:9])
    torch.testing.assert_close(network.logits(a[:, 4:9]), alone, rtol=1e-4, atol=1e-5)
    assert float((a[:, :4] - b[:, :4]).abs().max()) > 0.1


class Attending(torch.nn.Module):
    """A backbone with one attention, causal where no mask is given."""

    def __init__(self, heed_mask):
        super().__init__()
        self.heed_mask = heed_mask
        self.embedding = torch.nn.Embedding(64, 8)

    def forward(self, input_ids, position_ids, attention_mask):  # noqa: ARG002
        x = self.embedding(input_ids)[:, None]
        if self.heed_mask and attention_mask is not None:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=attention_mask)[:, 0]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]


def attending(heed_mask):
    module = torch.nn.Module()
    module.backbone, module.head = Attending(heed_mask), torch.nn.Linear(8, 64)
    return CausalLm(module)


def test_a_model_that_leaks_by_positions_gets_a_mask():
    network = attending(heed_mask=True).tried("the model")
    assert network.packing == "mask"
    with pytest.raises(ValueError, match="the model lets texts of a block see each other"):
        attending(heed_mask=False).tried("the model")


def test_a_recurrent_student_which_takes_no_mask_is_refused_in_a_sentence(folder):
    mamba = {"model_type": "mamba", "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
    student = LanguageModelConfig(config=mamba, tokenizer=str(folder))
    with pytest.raises(ValueError, match=r"see each other with position ids, and takes no mask \(.*choose a student"):
        build_language_model(student, load_tokenizer(folder, "tokenizer"))


def test_positions_begin_anew_with_each_text():
    found = positions(torch.tensor([[1, 1, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 4]]))
    assert found.tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


def test_a_soft_cap_behind_the_last_layer_is_refused(folder):
    gemma = {
        "model_type": "gemma2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.5,
        "final_logit_softcapping": 1.0,
    }
    with pytest.raises(ValueError, match="changes the logits behind its last layer"):
        build_language_model(
            LanguageModelConfig(config=gemma, tokenizer=str(folder)), load_tokenizer(folder, "tokenizer")
        )


def test_a_smaller_head_and_longer_blocks_are_refused(folder):
    network = built(folder)
    rows = network.head.weight.shape[0]
    require_suits(network, rows, 32)
    with pytest.raises(ValueError, match=f"has {rows} outputs, fewer than the {rows + 1} ids of the labels"):
        require_suits(network, rows + 1, 16)
    with pytest.raises(ValueError, match="blocks of 64 tokens are longer than the 32 positions of the student"):
        require_suits(network, rows, 64)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "must have model or config, one of them"),
        ({"model": "a", "config": {}}, "must have model or config, one of them"),
        ({"config": {}}, "tokenizer must be given, a folder"),
        ({"model": "module:factory"}, "tokenizer must be given, a folder"),
        ({"model": "folder", "options": {"a": 1}}, "options are arguments of a module:factory"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LanguageModelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"config": {"model_type": "lama"}},
            "student.config.model_type must be one that transformers knows, got 'lama'",
        ),
        ({"config": {**small.LLAMA, "layers": 2}}, "student.config.layers is not a setting of llama"),
        ({"config": {"model_type": "vit"}}, "student.config"),
        ({"model": "nowhere"}, "student.model: nowhere must be a folder with config.json"),
        ({"model": "small_language_trainings:missing"}, "cannot be found"),
    ],
)
def test_models_that_cannot_be_built_are_refused(folder, settings, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        build_language_model(
            LanguageModelConfig(**settings, tokenizer=str(folder)), load_tokenizer(folder, "tokenizer")
        )
