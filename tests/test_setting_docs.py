"""Settings say what they are: what is printed is what the classes declare, and there is none without a sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from distilbeam.pipelines.cli.settings import chosen, said_of_sections, setting_files, setting_lines
from distilbeam.pipelines.sections import SelectionSection
from distilbeam.pipelines.token_config import BlockSelectionSection
from distilbeam.selection.strategies.registry import names
from distilbeam.setting_docs import Setting, described, sections_of, together
from distilbeam.settings import Section


class _Leaf(Section):
    """A leaf."""

    depth: int = Field(3, ge=1, lt=9, description="how deep it hangs")


class _Branch(Section):
    """A branch
    with leaves."""

    first: _Leaf = Field(_Leaf(), description="the first leaf")
    others: dict[str, _Leaf] = Field({}, description="others by name")
    size: tuple[int, int] | None = Field(None, description="height and width")
    names: tuple[str, ...] = Field((), description="what it is called")
    colour: Literal["green", "red"] | float = Field("green", description="its colour, or a wave length")
    share: Annotated[float, Field(gt=0)] = Field(description="of the sun")


class _Tree(Section):
    branch: _Branch


def found_in(model: type[BaseModel]) -> dict[str, Setting]:
    return {setting.dotted: setting for setting in described(model)}


def test_a_setting_is_described_as_it_is_declared() -> None:
    found = found_in(_Tree)
    assert list(found) == [
        *(f"branch.{name}" for name in ("first", "others", "size", "names", "colour", "share")),
        "branch.first.depth",
        "branch.others.NAME.depth",
    ]
    assert found["branch.first.depth"] == Setting(
        "branch.first", "", "depth", "whole number", "3", False, "1 or more; below 9", "how deep it hangs"
    )
    said = {name: (s.type, s.default, s.required, s.allowed) for name, s in found.items()}
    assert said["branch.size"] == ("2 whole numbers", "unset", False, "")
    assert said["branch.names"] == ("list of texts", "[]", False, "")
    assert said["branch.colour"] == ("text or number", '"green"', False, '"green", "red"')
    assert said["branch.share"] == ("number", "", True, "above 0")
    assert said["branch.others"] == ("table", "{}", False, "")
    assert {place: text for place, _, text in sections_of(_Tree)}["branch"] == "A branch with leaves."


def test_files_that_share_a_setting_have_it_once() -> None:
    other = type("Other", (Section,), {"__annotations__": {"branch": _Branch, "leaf": _Leaf}})
    merged = {setting.dotted: setting.files for setting in together({"tree": _Tree, "other": other})}
    assert merged["branch.first.depth"] == ("tree", "other")
    assert merged["leaf.depth"] == ("other",)


def every_model() -> Iterator[type[BaseModel]]:
    def below(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for inner in model.__subclasses__():
            yield inner
            yield from below(inner)

    setting_files()  # imports them all
    yield from (model for model in below(Section) if model.__module__.startswith("distilbeam."))


def test_no_setting_is_without_a_sentence() -> None:
    every = together(setting_files())
    assert len(every) > 200
    silent = [f"{s.dotted} ({s.kind})" for s in every if len(re.findall(r"\w+", s.sentence)) < 2]
    assert silent == []
    said = said_of_sections(setting_files())
    assert [place for place in {(s.section, s.kind) for s in every} if not said.get(place)] == []


def test_no_class_of_settings_is_left_out() -> None:
    described_names = {(s.name, s.sentence) for s in together(setting_files())}
    files = {*setting_files().values()}
    for model in every_model():
        if model in files or model.__name__.startswith("_") or model.__name__ in ("Configuration", "PoolSection"):
            continue
        if (
            model.__name__ == "StreamSettings"
        ):  # options of a command, which its --help and the manual's page of it list
            continue
        for name, field in model.model_fields.items():
            assert (name, " ".join((field.description or "").split())) in described_names, f"{model.__name__}.{name}"


def test_the_strategies_of_a_run_are_those_that_are_printed() -> None:
    accepted = []
    for name in names():
        try:
            SelectionSection(method=name, budget=1)
        except ValueError:
            continue
        accepted.append(name)
    assert SelectionSection.model_fields["method"].examples == accepted


def test_one_section_or_one_setting_is_chosen() -> None:
    every = together(setting_files())
    assert {s.section for s in chosen(every, "training")} == {"training", "training.finetune", "training.augment"}
    rates = chosen(every, "training.lr")  # a language model has a default of its own
    assert [(s.dotted, s.files) for s in rates] == [
        ("training.lr", ("run", "training")),
        ("training.lr", ("run of a language model", "language model training")),
    ]
    with pytest.raises(ValueError, match=r"^trainning is no section and no setting; did you mean training\?$"):
        chosen(every, "trainning")
    with pytest.raises(
        ValueError, match=r"^crop is no section and no setting; did you mean training\.augment\.crop\?$"
    ):
        chosen(every, "crop")
    with pytest.raises(
        ValueError, match=r"^nonsense is no section and no setting; the sections are run, data, teacher, "
    ):
        chosen(every, "nonsense")
    with pytest.raises(ValueError, match=r"^lr is .*; did you mean training\.lr( or [a-z.]+\.lr)*\?$"):
        chosen(every, "lr")


def test_lines_are_as_wide_as_they_may_be() -> None:
    files = setting_files()
    lines = list(setting_lines(together(files), said_of_sections(files), 80))
    # a default or an allowed value is one word, which may be long
    assert [line for line in lines if len(line) > 80 and " " in line.strip() and ":" not in line] == []
    assert lines.count("[data]") == 1
    assert (
        lines[lines.index('[teacher] kind = "onnx"') + 1] == "An ONNX model, run by ONNX Runtime. (Run, labelling job.)"
    )
    place = lines.index("  num_classes: whole number, default unset")
    assert [line.strip() for line in lines[place + 1 : place + 4]][-1] == "Labelling job."
    assert "  lr: number, default 0.003" in lines


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "distilbeam", "settings", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)


def test_the_command_prints_text_and_json() -> None:
    out = command("selection", "--json")
    assert out.returncode == 0, out.stderr
    data: list[dict[str, Any]] = json.loads(out.stdout)
    # what chooses blocks is described otherwise than what chooses examples
    of_both = [*SelectionSection.model_fields, *BlockSelectionSection.model_fields]
    assert [item["name"] for item in data] == of_both
    budget = next(item for item in data if item["name"] == "budget")
    assert (budget["required"], budget["allowed"], budget["files"]) == (True, "1 or more", ["run"])
    out = command("selection.budgte")
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.strip() == "error: selection.budgte is no section and no setting; did you mean selection.budget?"
