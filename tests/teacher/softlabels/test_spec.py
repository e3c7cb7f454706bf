"""The specification: rules, JSON, versions, keys."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbeam.teacher.softlabels import SoftLabelSpec, label_key

NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=6, unique=True)


@st.composite
def specs(draw: st.DrawFn) -> SoftLabelSpec:
    names = draw(NAMES)
    kind = draw(st.sampled_from(["dense", "top_k", "sampled"]))
    limit = {"dense": 1, "top_k": len(names), "sampled": 2048}[kind]
    return SoftLabelSpec(
        num_classes=len(names),
        kind=kind,
        k=None if kind == "dense" else draw(st.integers(1, limit)),
        classes=draw(st.sampled_from([None, tuple(names)])),
        temperature=draw(st.floats(0.01, 100)),
        teacher=draw(st.text(max_size=20)),
        carried=tuple(draw(NAMES)),
        storage=draw(st.sampled_from(["float32", "float16"])),
    )


@given(specs())
def test_json_round_trip_is_exact(spec: SoftLabelSpec) -> None:
    assert SoftLabelSpec.from_json(spec.to_json()) == spec
    assert SoftLabelSpec.from_json(spec.to_json().encode()) == spec
    assert SoftLabelSpec.from_json(json.loads(spec.to_json())) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(SoftLabelSpec.from_json(spec.to_json())) == hash(spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number from 2 to 2,147,483,647, got 1"),
        ({"num_classes": 2.0}, "num_classes must be a whole number from 2 to 2,147,483,647, got 2.0"),
        ({"num_classes": 3, "kind": "topk"}, "kind must be one of dense, top_k, sampled, got 'topk'"),
        ({"num_classes": 3, "k": 2}, "k must be left out for dense labels, got 2; kind 'top_k' keeps k classes"),
        ({"num_classes": 3, "kind": "top_k"}, "k must be given for top_k labels"),
        ({"num_classes": 3, "kind": "top_k", "k": 4}, "k must be a whole number from 1 to 3, got 4"),
        ({"num_classes": 3, "kind": "sampled", "k": 4096}, "k must be a whole number from 1 to 2,048, got 4096"),
        ({"num_classes": 3, "classes": ["a", "b"]}, "classes must be one name for each of the 3 classes, got 2 names"),
        ({"num_classes": 2, "classes": ["a", "a"]}, "classes must be distinct, got 'a' twice"),
        ({"num_classes": 2, "carried": "image"}, "carried must be a list of strings, got 'image'"),
        ({"num_classes": 2, "temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"num_classes": 2, "temperature": float("inf")}, "temperature must be a positive number, got inf"),
        ({"num_classes": 2, "storage": "int8"}, "storage must be one of float32, float16, got 'int8'"),
        ({"num_classes": 2, "version": "one"}, "version must be 'major.minor', got 'one'"),
    ],
)
def test_every_rule_is_a_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
        SoftLabelSpec(**fields)
    assert str(caught.value) == message


def test_newer_minor_version_with_more_fields_is_read() -> None:
    data = {**json.loads(SoftLabelSpec(3).to_json()), "version": "1.7", "codebook": [1, 2]}
    spec = SoftLabelSpec.from_json(data)
    assert (spec.num_classes, spec.version) == (3, "1.7")


def test_older_minor_version_without_later_fields_is_read() -> None:
    spec = SoftLabelSpec.from_json({"format": "distilbeam.softlabels", "version": "1.0", "num_classes": 3})
    assert spec == SoftLabelSpec(3, version="1.0")


@pytest.mark.parametrize(
    ("version", "way_out"), [("3.0", "install a newer distilbeam"), ("0.9", "write the dataset again")]
)
def test_other_major_version_is_refused(version: str, way_out: str) -> None:
    data = {**json.loads(SoftLabelSpec(3).to_json()), "version": version}
    expected = (
        f"soft labels of format version {version} cannot be read by this release, which reads 1.x and 2.x; {way_out}"
    )
    with pytest.raises(ValueError, match=f"^{expected}$"):
        SoftLabelSpec.from_json(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the soft-label specification is not valid JSON"),
        ("[1]", "a soft-label specification must be a JSON object, got list"),
        ("{}", "format must be 'distilbeam.softlabels', got None; this is not a soft-label dataset"),
        ('{"format": "distilbeam.softlabels"}', "version must be 'major.minor', got None"),
        ('{"format": "distilbeam.softlabels", "version": "1.0"}', "num_classes must be given"),
    ],
)
def test_what_is_no_specification_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftLabelSpec.from_json(text)


def test_label_key_depends_on_content_teacher_and_form_only() -> None:
    spec = SoftLabelSpec(10, "top_k", 3, teacher="t", carried=("x",))
    key = label_key("content", "t", spec)
    assert key == label_key("content", "t", SoftLabelSpec(10, "top_k", 3, teacher="t", carried=("x",), version="1.4"))
    others = [
        label_key("other", "t", spec),
        label_key("content", "u", spec),
        label_key("content", "t", SoftLabelSpec(10, "top_k", 4, teacher="t", carried=("x",))),
        label_key("content", "t", SoftLabelSpec(10, "sampled", 3, teacher="t", carried=("x",))),
        label_key("content", "t", SoftLabelSpec(11, "top_k", 3, teacher="t", carried=("x",))),
        label_key("content", "t", SoftLabelSpec(10, "top_k", 3, teacher="t", carried=("x",), temperature=2)),
        label_key("content", "t", SoftLabelSpec(10, "top_k", 3, teacher="t", carried=("x",), storage="float16")),
        label_key("content", "t", SoftLabelSpec(10, "top_k", 3, teacher="t")),
    ]
    assert len({key, *others}) == 9


def test_label_key_is_the_same_on_every_machine() -> None:
    # Written down once: a key that moves would label every shard again.
    assert label_key("c", "t", SoftLabelSpec(10, teacher="t")) == "97df9e91fcf355046d81aa672c73c73f"


def test_differences_name_field_and_values() -> None:
    one, two = (
        SoftLabelSpec(10, teacher="a"),
        SoftLabelSpec(10, "top_k", 2, teacher="b", storage="float16", carried=("x",)),
    )
    assert one.differences(two) == ["kind ('dense' and 'top_k')", "k (unset and 2)", "teacher ('a' and 'b')"]
    assert one.differences(SoftLabelSpec(10, teacher="a", storage="float16")) == []


def test_class_name_falls_back_to_the_index() -> None:
    assert SoftLabelSpec(2, classes=("cat", "dog")).class_name(1) == "dog"
    assert SoftLabelSpec(2).class_name(1) == "1"
