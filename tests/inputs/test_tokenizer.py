"""The identity of a tokenizer: what its ids mean, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra hf")

from language_models import EOS, write_tokenizer

from distilbeam.inputs.tokenizer import load_tokenizer


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    return folder


def swap_two_ids(data: dict[str, Any]) -> None:
    vocabulary = data["model"]["vocab"]
    one, two = [token for token, id_ in vocabulary.items() if id_ in (40, 41)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def test_num_classes_is_the_highest_id_plus_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path), "--tokenizer")
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].values()
    assert tokenizer.num_classes == max(ids) + 1 == len(ids)
    assert tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.end_of_text) == EOS


def test_one_differing_id_is_another_tokenizer(tmp_path: Path) -> None:
    one = load_tokenizer(write_tokenizer(tmp_path / "one"), "--tokenizer")
    same = load_tokenizer(write_tokenizer(tmp_path / "same"), "--tokenizer")
    other = load_tokenizer(changed(write_tokenizer(tmp_path / "other"), swap_two_ids), "--tokenizer")
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    same.require_same(one.fingerprint(), one.num_classes, "the labels")
    with pytest.raises(
        ValueError, match=r"other is not the one of the labels: they differ in what one of the \d+ ids means"
    ):
        other.require_same(one.fingerprint(), one.num_classes, "the labels")


def test_a_pre_tokeniser_is_part_of_it_and_a_chat_template_is_not(tmp_path: Path) -> None:
    one = load_tokenizer(write_tokenizer(tmp_path / "one"), "--tokenizer")
    spaced = changed(
        write_tokenizer(tmp_path / "spaced"), lambda data: data["pre_tokenizer"].update({"add_prefix_space": True})
    )
    untold = load_tokenizer(write_tokenizer(tmp_path / "untold", chat_template=None), "--tokenizer")
    assert load_tokenizer(spaced, "--tokenizer").fingerprint() != one.fingerprint()
    assert untold.fingerprint() == one.fingerprint()
    assert (untold.chat_template_hash(), len(one.chat_template_hash())) == ("", 16)


def test_further_ids_agree_and_missing_ones_do_not(tmp_path: Path) -> None:
    one = load_tokenizer(write_tokenizer(tmp_path / "one"), "--tokenizer")
    more = load_tokenizer(write_tokenizer(tmp_path / "more"), "--tokenizer")
    more.tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    more.tokenizer.save_pretrained(tmp_path / "more")
    more = load_tokenizer(tmp_path / "more", "--tokenizer")
    assert more.num_classes == one.num_classes + 1
    assert more.fingerprint() != one.fingerprint()
    more.require_same(one.fingerprint(), one.num_classes, "the labels")
    with pytest.raises(ValueError, match=f"has {one.num_classes} ids, fewer than the {more.num_classes} of the labels"):
        one.require_same(more.fingerprint(), more.num_classes, "the labels")


def test_what_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--tokenizer: .* must be a folder with tokenizer.json on this disk$"):
        load_tokenizer(tmp_path / "nowhere", "--tokenizer")
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can load"):
        load_tokenizer(tmp_path, "--tokenizer")
