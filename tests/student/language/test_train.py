"""Trainings of language models: what they learn and leave, how they go on when stopped, and what they refuse."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import small_language_trainings as small
import small_trainings
import torch
from language_models import write_model, write_tokenizer
from on_step import OnStep
from safetensors.torch import load_file

from distilbeam.student.checkpoint import load_student
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.evaluate import evaluate_language_model, token_bytes
from distilbeam.student.language.folder import is_language_model, load_language_model
from distilbeam.student.language.launch import train_file
from distilbeam.student.language.train import train_language_model
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.train import train

transformers = pytest.importorskip("transformers", reason="needs distilbeam[hf]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write labels of 48 blocks, others of 24 for validation, and draws."""
    directory = tmp_path_factory.mktemp("lm")
    small.write_blocks(directory / "labels", directory / "tokenizer")
    small.write_blocks(directory / "held", directory / "tokenizer", rows=24, seed=3)
    small.write_blocks(directory / "draws", directory / "tokenizer", kind="sampled", k=32)
    return directory


def trained(place, directory, *, labels="labels", validation=None, seed=1, progress=None, config=None, **changes):
    student, training = small.settings(place / "tokenizer", config, **changes)
    data = {"soft_labels": [place / labels], "validation": validation and place / validation}
    return train_language_model(student, training, **data, directory=directory, seed=seed, progress=progress)


@pytest.mark.parametrize("labels", ["labels", "draws"])
def test_a_student_comes_nearer_to_its_teacher(place, tmp_path, labels):
    few = trained(place, tmp_path / "few", labels=labels, validation="held", epochs=1, lr=1e-4, hard_share=0.0).metrics
    many = trained(
        place, tmp_path / "many", labels=labels, validation="held", epochs=40, hard_share=0.0, checkpoint_steps=10_000
    ).metrics
    assert many["validation_kl"] < 0.75 * few["validation_kl"]
    assert many["validation_agreement"] > few["validation_agreement"] + 0.1
    assert many["tokens"] == 40 * few["tokens"]


def test_transformers_opens_what_a_training_leaves(place, tmp_path):
    result = trained(place, tmp_path / "student", validation="held", ema=0.9, config={"tie_word_embeddings": True})
    assert is_language_model(result.directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(result.directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.directory)
    opened = load_language_model(result.directory)
    ids = tokenizer("the teacher writes", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = opened.network.logits(opened.network.hidden(ids, torch.ones_like(ids)))
        torch.testing.assert_close(model(input_ids=ids).logits, found)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert opened.complete("the teacher writes", 4).startswith(tokenizer.decode(generated[0])[:20])
    measured = evaluate_language_model(result.directory, place / "held")
    assert measured["nll"] == pytest.approx(result.metrics["validation_nll"], rel=1e-5)
    with pytest.raises(ValueError, match="holds a language model, which classifies nothing"):
        load_student(result.directory)


def test_the_same_seed_gives_the_same_weights_and_a_stopped_training_goes_on_to_them(place, tmp_path):
    def stop(done, _total, _note):
        if done == 7:
            raise KeyboardInterrupt

    changes = {"epochs": 3, "ema": 0.9, "config": {"attention_dropout": 0.1}}
    trained(place, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        trained(place, tmp_path / "stopped", progress=OnStep(stop), **changes)
    assert (tmp_path / "stopped.training").is_dir()
    with pytest.raises(ValueError, match=r"differs in training.lr \(0.01 there, 0.02 now\)"):
        trained(place, tmp_path / "stopped", lr=0.02, **changes)
    trained(place, tmp_path / "stopped", **changes)
    assert not (tmp_path / "stopped.training").exists()
    whole, gone_on = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)
    trained(place, tmp_path / "other", seed=2, **changes)
    assert not all(torch.equal(v, whole[k]) for k, v in load_file(tmp_path / "other" / "model.safetensors").items())


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"accumulate": 3}, {"precision": "bf16"}])
def test_how_it_is_computed_changes_rounding_alone(place, tmp_path, changes):
    plain = trained(place, tmp_path / "plain", optimizer="sgd", lr=0.3).metrics["train_loss"]
    found = trained(place, tmp_path / "changed", optimizer="sgd", lr=0.3, **changes).metrics["train_loss"]
    assert found == pytest.approx(plain, rel=1e-2 if "precision" in changes else 1e-6)
    assert ("precision" in changes) == (abs(found - plain) > 1e-6)


def test_plain_training_reads_no_label(place, tmp_path):
    copy = {}
    for k in (4, 8):
        small.write_blocks(tmp_path / f"k{k}", place / "tokenizer", k=k)
        student, training = small.settings(place / "tokenizer", hard_share=1.0)
        train_language_model(student, training, soft_labels=[tmp_path / f"k{k}"], directory=tmp_path / f"s{k}", seed=1)
        copy[k] = load_file(tmp_path / f"s{k}" / "model.safetensors")
    assert all(torch.equal(copy[4][name], copy[8][name]) for name in copy[4])


def test_a_folder_is_gone_on_with(place, tmp_path):
    folder = write_model(tmp_path / "model", vocabulary=400, places=32)
    shutil.rmtree(tmp_path / "model" / "tokenizer", ignore_errors=True)
    for file in place.joinpath("tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    (tmp_path / "t.toml").write_text(
        f'[data]\nsoft_labels = ["{place}/labels"]\n[student]\nkind = "causal_lm"\nmodel = "model"\n'
        "[training]\nlr = 1e-4\nbatch_size = 48\nwarmup = 0.5\n"
    )
    result = train_file(tmp_path / "t.toml", ["data.seed=3"])
    assert result.directory == tmp_path / "student"
    before, after = load_file(folder / "model.safetensors"), load_file(result.directory / "model.safetensors")
    assert before.keys() == after.keys()
    largest = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < largest < 1e-3  # one step of AdamW at 1e-4
    told = json.loads((result.directory / "student.json").read_text())
    assert told["config"]["model"] == "."
    assert str(tmp_path) not in json.dumps(told)


def test_a_module_of_ones_own(place, tmp_path):
    student = LanguageModelConfig(model="small_language_trainings:Recurrent", tokenizer=str(place / "tokenizer"))
    _, training = small.settings(place / "tokenizer", epochs=3)
    result = train_language_model(
        student, training, soft_labels=[place / "labels"], directory=tmp_path / "student", seed=1
    )
    opened = load_language_model(result.directory, trust=["small_language_trainings"])
    assert opened.network.packing == "positions"
    kept = load_file(result.directory / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in opened.network.model.state_dict().items())
    with pytest.raises(ValueError, match="checkpointing is for models of transformers"):
        train_language_model(
            student,
            training.model_copy(update={"checkpointing": True}),
            soft_labels=[place / "labels"],
            directory=tmp_path / "other",
            seed=1,
        )


def test_labels_of_the_other_unit_are_refused(place, tmp_path):
    data = small_trainings.write_vectors(tmp_path / "rows")
    student, training = small.settings(place / "tokenizer")
    with pytest.raises(ValueError, match="unit"):
        train_language_model(student, training, soft_labels=[tmp_path / "rows"], directory=tmp_path / "s", seed=1)
    configs = small_trainings.settings("vectors")
    with pytest.raises(ValueError, match="unit"):
        train(*configs, **{**data, "soft_labels": [place / "labels"]}, directory=tmp_path / "s", seed=1)
    with pytest.raises(ValueError, match=r"'distilbeam launch TRAINING\.toml' trains"):
        StudentConfig(kind="causal_lm", input={"columns": ["x"]})


def test_another_tokenizer_and_a_smaller_head_are_refused(place, tmp_path):
    student, training = small.settings(place / "tokenizer")
    other = write_tokenizer(tmp_path / "other", vocabulary=small.VOCABULARY)
    told = json.loads((other / "tokenizer.json").read_text())
    merged = sorted(told["model"]["vocab"].items(), key=lambda pair: pair[1])
    (one, a), (two, b) = merged[-1], merged[-2]
    told["model"]["vocab"] |= {one: b, two: a}  # one id means another token
    (other / "tokenizer.json").write_text(json.dumps(told))
    data = {"soft_labels": [place / "labels"], "directory": tmp_path / "s", "seed": 1}
    with pytest.raises(ValueError, match="they differ in what one of the 280 ids means"):
        train_language_model(student.model_copy(update={"tokenizer": str(other)}), training, **data)
    fewer = write_tokenizer(tmp_path / "fewer", vocabulary=270)
    with pytest.raises(ValueError, match="has 270 ids, fewer than the 280 of the labels"):
        train_language_model(student.model_copy(update={"tokenizer": str(fewer)}), training, **data)
    with pytest.raises(ValueError, match="last layer has 270 outputs, fewer than the 280 ids of the labels"):
        trained(place, tmp_path / "s", config={"vocab_size": 270})
    with pytest.raises(ValueError, match="blocks of 16 tokens are longer than the 12 positions of the student"):
        trained(place, tmp_path / "s", config={"max_position_embeddings": 12})


def test_a_loss_that_is_no_number_stops_the_training(place, tmp_path):
    with pytest.raises(ValueError, match=r"in step \d+ of 12, over the blocks .*; lower training.lr"):
        trained(place, tmp_path / "s", optimizer="sgd", lr=1e30, clip=None, warmup=0.0)


def test_bytes_of_tokens_are_those_of_their_text(place):
    tokenizer = load_language_tokenizer(place)
    lengths = token_bytes(tokenizer, tokenizer.num_classes)
    for text in ("the teacher writes", "naïve – “quoted”, ", "🙂 a"):
        ids = tokenizer.tokenizer(text)["input_ids"]
        assert int(np.sum(lengths[ids])) == len(text.encode())
    assert lengths[tokenizer.end_of_text] == 0


def load_language_tokenizer(place):
    from distilbeam.inputs.tokenizer import load_tokenizer

    return load_tokenizer(place / "tokenizer", "tokenizer")
