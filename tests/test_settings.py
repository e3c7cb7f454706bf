"""Settings: what is read, what lies over it, and that whoever reads them says each mistake in the same sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.transforms import stream_job
from distilbeam.settings import Configuration, Section, override, read_settings, read_toml, validated
from distilbeam.student.training import launch

TEACHER = 'kind = "torch"\nmodel = "teacher.pt2"\ninput = { columns = ["x"] }\n'
STUDENT = '[student]\ninput = { columns = ["x"] }\n'
LABELLING = f'[data]\npool = "pool"\nnum_classes = 3\n[teacher]\n{TEACHER}'
RUN = (
    f'[data]\npool = "p"\nlabelled = "a.parquet"\nvalidation = "v.parquet"\n[teacher]\n{TEACHER}'
    f"[selection]\nbudget = 10\n{STUDENT}"
)
TRAINING = f'[data]\nclasses = ["a", "b"]\n{STUDENT}'


def said_by_command(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError), result.exception
    return str(result.exception)


def said_by_run(path: Path, overrides: list[str]) -> str:
    return said_by_command(["run", str(path), *(word for text in overrides for word in ("--set", text))])


def said_by_launcher(path: Path, overrides: list[str]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole message is compared
        launch.read_config(path, overrides)
    return str(caught.value)


def said_by_stream(path: Path, overrides: list[str]) -> str:
    given = [f"--set={text}" for text in overrides]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        stream_job.main([f"--config={path}", "--source=parquet:*.parquet", "--out=labels", *given])
    return str(caught.value)


def said_by_ingest(path: Path, overrides: list[str]) -> str:
    texts = [f"@{path}", *overrides]
    return said_by_command(
        ["ingest", "a.csv", "--out=pool", "--format=csv", *(word for text in texts for word in ("--set", text))]
    )


@dataclass(frozen=True)
class Reader:
    """Who reads settings, and names of theirs: a section, a whole number in one that is at least 1, and wrong forms."""

    say: Callable[[Path, list[str]], str]
    text: str
    section: str
    wrong_section: str
    number: str
    wrong_number: str


READERS = {
    "command line": Reader(said_by_run, RUN, "engine", "engin", "engine.unit_rows", "engine.unit_row"),
    "launcher": Reader(said_by_launcher, TRAINING, "training", "trainig", "training.epochs", "training.epoch"),
    "streaming job": Reader(said_by_stream, LABELLING, "engine", "engin", "engine.unit_rows", "engine.unit_row"),
    "ingest": Reader(said_by_ingest, 'delimiter = ";"\n', "vectors", "vector", "file_rows", "file_row"),
}


@pytest.mark.parametrize("who", READERS)
def test_every_mistake_is_the_same_sentence_whoever_reads(who: str, tmp_path: Path) -> None:
    reader, path, bad = READERS[who], tmp_path / "c.toml", tmp_path / "bad.toml"
    path.write_text(reader.text)
    bad.write_text("[run\n")
    no_file = f"no configuration file at {tmp_path / 'none.toml'}; name one that is there, or let 'distilbeam init DIRECTORY' write one"
    bad_toml = f"{bad} is not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 5)"
    mistakes = {
        f"{reader.wrong_section}.x=1": f"{reader.wrong_section} is not a setting; did you mean {reader.section}?",
        f"{reader.wrong_number}=1": f"{reader.wrong_number} is not a setting; did you mean {reader.number}?",
        f"{reader.number}=many": f"{reader.number}: must be a valid integer, got 'many'",
        f"{reader.number}=0": f"{reader.number}: must be greater than or equal to 1, got 0",
        f"{reader.number}": f"--set takes section.key=value, got '{reader.number}'",
        f"{reader.section}..x=1": f"--set takes section.key=value, got '{reader.section}..x=1'",
        f"@{tmp_path / 'none.toml'}": no_file,
        f"@{bad}": bad_toml,
    }
    assert {text: reader.say(path, [text]) for text in mistakes} == mistakes
    assert reader.say(tmp_path / "none.toml", []) == no_file
    assert reader.say(bad, []) == bad_toml
    assert reader.say(tmp_path, []) == f"{tmp_path} is a directory; name the configuration file in it"
    name = reader.number.rsplit(".", 1)[-1]
    into_value = f"{reader.number}.x=3"
    assert (
        reader.say(path, [f"{reader.number}=3", into_value])
        == f"--set {into_value}: '{name}' is a value, not a section"
    )


def test_overrides_nest_and_take_toml_or_text(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('\ufeff[a]\r\nb = 1\r\n[a.c]\r\nd = "x"\r\n')
    (more := tmp_path / "more.toml").write_text("[a.c]\ne = [1, 2]\n[f]\ng = true\n")
    assert read_toml(path) == {"a": {"b": 1, "c": {"d": "x"}}}
    overrides = ["a.c.d=some/where", f"@{more}", "a.c.h.i={ j = 2.5 }", "a.b=2"]
    expected = {"a": {"b": 2, "c": {"d": "some/where", "e": [1, 2], "h": {"i": {"j": 2.5}}}}, "f": {"g": True}}
    assert read_settings(path, overrides) == expected


def test_text_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b'a = "\xe9"\n')
    with pytest.raises(ValueError, match=r"c.toml is not valid TOML: it must be stored in UTF-8"):
        read_toml(tmp_path / "c.toml")


class Small(Section):
    kind: Literal["small"] = "small"
    rows: int = Field(1, ge=1)


class Large(Section):
    kind: Literal["large"] = "large"
    bytes: int = 1


class Whole(Section):
    part: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    named: dict[str, Small] = Field({})
    listed: tuple[Small, ...] = ()
    pair: tuple[int, int] | None = None


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"part": {"kind": "small", "row": 2}}, "part.row is not a setting; did you mean part.rows?"),
        ({"part": {"kind": "large", "rows": 2}}, "part.rows is not a setting; the valid ones are bytes, kind"),
        ({"part": {"kind": "huge"}}, "part.kind must be one of small, large, got 'huge'"),
        ({"part": {}}, "part.kind must be one of small, large, got 'nothing'"),
        ({"named": {"a.b": {"row": 2}}}, "named.a.b.row is not a setting; did you mean named.a.b.rows?"),
        ({"named": {"a": {"x": 2}}}, "named.a.x is not a setting; the valid ones are kind, rows"),
        ({"listed": [{}, {"rows": 0}]}, "listed.1.rows: must be greater than or equal to 1, got 0"),
        ({"pair": [1, "x"]}, "pair.1: must be a valid integer, got 'x'"),
    ],
)
def test_settings_in_unions_and_collections_are_named_as_in_the_file(data: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        validated(Whole, data)
    assert str(caught.value) == sentence


def test_several_mistakes_are_a_line_each() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        validated(Whole, {"pat": 1, "part": {"kind": "small", "rows": 0}})
    assert str(caught.value).splitlines() == [
        "part.rows: must be greater than or equal to 1, got 0",
        "pat is not a setting; did you mean part?",
    ]


def test_an_override_of_a_section_replaces_it() -> None:
    data: dict[str, Any] = {"a": {"b": 1}}
    override(data, "a={ c = 2 }")
    assert data == {"a": {"c": 2}}


class Place(Section):
    folder: str
    files: tuple[str, ...] = ()
    name: str = "a name"

    def paths(self) -> tuple[str, ...]:
        return ("folder", "files")


class WithPlaces(Configuration):
    one: Place
    named: dict[str, Place] = Field({})


def with_places(folder: str) -> WithPlaces:
    return validated(
        WithPlaces,
        {
            "one": {"folder": folder, "files": ["x", "/y", "gs://bucket/z"]},
            "named": {"n": {"folder": "sub/../deep"}},
        },
    )


def test_paths_of_inner_sections_become_absolute_and_are_dumped_as_written() -> None:
    written = with_places("here")
    absolute = written.relative_to(Path("/base"))
    assert (absolute.one.folder, absolute.one.name) == ("/base/here", "a name")
    assert absolute.one.files == ("/base/x", "/y", "gs://bucket/z")
    assert absolute.named["n"].folder == "/base/sub/../deep"
    assert written.one.folder == "here"
    assert absolute.dump() == written.dump()
    assert absolute.relative_to(Path("/other")).model_dump() == absolute.model_dump()  # nothing is left to resolve
    assert absolute.relative_to(Path("/other")).dump() == written.dump()


def test_a_path_that_is_changed_afterwards_is_dumped_as_it_is_then() -> None:
    absolute = with_places("here").relative_to(Path("/base"))
    changed = absolute.model_copy(update={"one": absolute.one.model_copy(update={"folder": "/base/there"})})
    assert changed.dump()["one"]["folder"] == "/base/there"
    assert changed.dump()["one"]["files"] == ["x", "/y", "gs://bucket/z"]


def test_settings_that_were_written_absolute_stay_so_beside_the_same_place_written_relative() -> None:
    absolute = with_places("/base/x").relative_to(Path("/base"))
    assert (absolute.one.folder, absolute.one.files[0]) == ("/base/x", "/base/x")
    assert (absolute.dump()["one"]["folder"], absolute.dump()["one"]["files"][0]) == ("/base/x", "x")
