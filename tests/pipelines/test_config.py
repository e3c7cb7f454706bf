from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from distilbeam.pipelines.config import (
    LabelConfig,
    differing_keys,
    load_any_config,
    load_config,
    parse_config,
    write_config,
)
from distilbeam.pipelines.jobs.opening import opened_run

SETTINGS: dict[str, Any] = {
    "data": {"pool": "pool", "labelled": "a.parquet", "validation": "v.parquet"},
    "teacher": {"kind": "torch", "model": "teacher.pt2", "input": {"columns": ["x"]}},
    "selection": {"budget": 10},
    "student": {"input": {"columns": ["x"]}},
}


def changed(name: str, value: Any) -> dict[str, Any]:
    settings = copy.deepcopy(SETTINGS)
    *sections, key = name.split(".")
    target = settings
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = value
    return settings


def test_defaults() -> None:
    config = parse_config(SETTINGS)
    assert (config.run.rounds, config.run.seed, config.run.directory) == (3, 0, "run")
    assert (config.selection.method, config.selection.gain, config.labels.kind) == ("herding", "margin", "dense")
    assert config.labels.temperature == "calibrated"


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(SETTINGS).selection.budget = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("selection.budgte", 3, "selection.budgte is not a setting; did you mean selection.budget?"),
        ("selction.budget", 3, "selction is not a setting; did you mean selection?"),
        ("seed", 3, "seed is not a setting; did you mean run.seed?"),
        ("epochs", 3, "epochs is not a setting; did you mean training.epochs?"),
        ("teacher.modle", "x", "teacher.modle is not a setting; did you mean teacher.model?"),
        ("student.input.colums", ["x"], "student.input.colums is not a setting; did you mean student.input.columns?"),
        ("selection.budget", "many", "selection.budget: must be a valid integer, got 'many'"),
        ("tune.space", {"training.lr": {"low": 1}}, "tune.space.training.lr.low must be below high, got 1 and None"),
        (
            "tune.space",
            {"training.lr": {"lo": 1}},
            "tune.space.training.lr.lo is not a setting; did you mean tune.space.training.lr.low?",
        ),
        ("pareto.widths", [], "pareto.widths"),
        ("pareto.grow", 1, "pareto.grow: must be greater than 1, got 1"),
        ("selection.budget", 0, "selection.budget: must be greater than or equal to 1, got 0"),
        ("run.rounds", 2.5, "run.rounds: must be a valid integer, got 2.5"),
        ("run.seed", -1, "run.seed: must be greater than or equal to 0, got -1"),
        (
            "selection.method",
            "radd",
            "selection.method must be one of uniform, margin, entropy, least-confidence, greedy, rad, rad-loss",
        ),
        ("selection.method", "mine", "selection.method must be one of uniform, margin"),
        ("selection.method", "no_such_module:C", "selection.method: module 'no_such_module' is not installed"),
        ("selection.method", "json:dumps", "selection.method must name a subclass of distilbeam.selection.Selector"),
        (
            "selection.method",
            "rad_capped",
            "selection.method must be a strategy that reads gains, logits, embeddings alone, ",
        ),
        ("selection.gain", "size", "selection.gain must be one of margin, entropy, least_confidence, got 'size'"),
        ("labels.k", 3, "labels.k must be given for top_k and sampled labels, and only for them"),
        ("labels.temperature", 0, "labels.temperature must be a positive number or 'calibrated', got 0"),
        ("labels.temperature", "hot", "labels.temperature must be a positive number or 'calibrated', got 'hot'"),
        ("labels.kind", "top_k", "labels.k must be given for top_k and sampled labels, and only for them"),
        ("data.classes", ["a", "a"], "data.classes must be at least two different names"),
        ("student.kind", "mpl", "student.kind must be one of linear, mlp, cnn"),
        ("engine.shard_rows", 0, "engine.shard_rows: must be greater than or equal to 1, got 0"),
    ],
)
def test_each_wrong_setting_is_one_sentence(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        parse_config(changed(name, value))
    assert str(error.value).startswith(sentence)
    assert len(str(error.value).splitlines()) == 1


def test_an_unknown_kind_of_teacher_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^teacher.kind.* must be .*torch.*, got 'torsh'"):
        parse_config(changed("teacher.kind", "torsh"))


def test_every_wrong_setting_is_named() -> None:
    settings = changed("run.seed", -1)
    settings["selection"]["budgte"] = 1
    del settings["data"]["pool"]
    with pytest.raises(ValueError, match="budgte") as error:
        parse_config(settings)
    assert sorted(line.split()[0].rstrip(":") for line in str(error.value).splitlines()) == [
        "data.pool",
        "run.seed",
        "selection.budgte",
    ]


def write(path: Path, settings: str) -> Path:
    path.write_text(settings)
    return path


TOML = """
[data]
pool = "pool"
labelled = "a.parquet"
validation = "v.parquet"
[teacher]
kind = "torch"
model = "t.pt2"
input = { columns = ["x"] }
[selection]
budget = 10
[student]
input = { columns = ["x"] }
"""


def test_overrides_are_toml_values_or_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", TOML)
    config = load_config(path, ["run.rounds=5", "data.pool=some/where", "student.hidden=[8, 9]", 'labels.kind="dense"'])
    assert (config.run.rounds, config.data.pool, config.student.hidden) == (5, str(tmp_path / "some/where"), (8, 9))


def test_paths_are_absolute_once_a_file_is_read_and_stored_as_written(tmp_path: Path) -> None:
    words = ["data.test=/elsewhere/t.parquet", "run.directory=../run", "student.kind=text", "student.input.kind=text"]
    words += ["student.input.tokenizer=tokens.json"]
    config = load_config(write(tmp_path / "c.toml", TOML), words)
    data = config.data
    assert (data.pool, data.labelled, data.validation) == tuple(
        str(tmp_path / name) for name in ("pool", "a.parquet", "v.parquet")
    )
    assert (data.test, config.run.directory) == ("/elsewhere/t.parquet", str(tmp_path / "../run"))
    assert getattr(config.teacher, "model") == str(tmp_path / "t.pt2")  # noqa: B009  # of this kind of teacher
    assert config.student.input.tokenizer == str(tmp_path / "tokens.json")
    moved = tmp_path / "moved"
    moved.mkdir()
    assert load_config(write(moved / "c.toml", TOML), words).dump() == config.dump()
    assert config.dump() == parse_config(config.dump()).dump()
    assert [
        config.dump()[section][key] for section, key in (("data", "pool"), ("data", "test"), ("teacher", "model"))
    ] == [
        "pool",
        "/elsewhere/t.parquet",
        "t.pt2",
    ]


def test_a_labelling_job_knows_its_paths_too(tmp_path: Path) -> None:
    text = """
[data]
pool = "s3://bucket/pool"
num_classes = 3
[teacher]
kind = "beam"
handler = "mine:handler"
files = ["a.bin", "/abs/b.bin"]
input = { columns = ["x"] }
[watch]
budget = 3
student = "student"
wrong_share = 0.1
"""
    config = load_any_config(write(tmp_path / "c.toml", text))
    assert isinstance(config, LabelConfig)
    assert (config.data.pool, config.run.directory) == ("s3://bucket/pool", str(tmp_path / "labelling"))
    assert getattr(config.teacher, "files") == (str(tmp_path / "a.bin"), "/abs/b.bin")  # noqa: B009
    assert config.watch.student == str(tmp_path / "student")
    written = config.dump()
    assert (written["run"]["directory"], written["watch"]["student"]) == ("labelling", "student")
    assert written["teacher"]["files"] == ["a.bin", "/abs/b.bin"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.rounds", "--set takes section.key=value, got 'run.rounds'"),
        ("=3", "--set takes section.key=value, got '=3'"),
        ("run.roundz=3", "run.roundz is not a setting; did you mean run.rounds?"),
        ("data.pool.x=3", "--set data.pool.x=3: 'pool' is a value, not a section"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config(write(tmp_path / "c.toml", TOML), [override])
    assert str(error.value) == sentence


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"no configuration file at .*; name one that is there, or let 'distilbeam init DIRECTORY' write one",
    ):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=r"c.toml is not valid TOML: .*line 1"):
        load_config(write(tmp_path / "c.toml", "[run\n"))


def test_the_resolved_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    config = parse_config(changed("labels.kind", "dense"))
    write_config(tmp_path / "resolved.toml", config)
    assert load_config(tmp_path / "resolved.toml").dump() == config.dump()


def test_differing_keys_are_named_with_both_values() -> None:
    old, new = parse_config(SETTINGS).dump(), parse_config(changed("run.rounds", 4)).dump()
    assert differing_keys(old, new) == ["run.rounds (3 there, 4 now)"]
    assert differing_keys(old, parse_config(changed("data.id", "key")).dump()) == ["data.id (unset there, 'key' now)"]
    assert differing_keys(old, old) == []


def test_the_starting_file_is_valid() -> None:
    from importlib import resources

    text = resources.files("distilbeam.pipelines").joinpath("template.toml").read_text()
    config = parse_config(tomllib.loads(text))
    assert config.selection.budget == 1000
    for line in text.splitlines():  # what is commented out is valid too
        if line.startswith("# ") and " = " in line:
            tomllib.loads(line.removeprefix("# "))


def test_another_file_over_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(tomli_w.dumps(changed("training", {"lr": 0.5, "epochs": 7})))
    (tmp_path / "best.toml").write_text("[training]\nlr = 0.25\n[student]\nhidden = [5]\n")
    config = load_config(tmp_path / "a.toml", [f"@{tmp_path / 'best.toml'}", "training.batch_size=9"])
    assert (config.training.lr, config.training.epochs, config.training.batch_size) == (0.25, 7, 9)
    assert config.student.hidden == (5,)
    assert config.student.input.columns == ("x",)
    with pytest.raises(ValueError, match=r"no configuration file at nowhere\.toml"):
        load_config(tmp_path / "a.toml", ["@nowhere.toml"])


def test_searches_do_not_belong_to_a_run(tmp_path: Path) -> None:
    with opened_run(parse_config(SETTINGS).relative_to(tmp_path)):
        pass
    with opened_run(
        parse_config(changed("tune.trials", 5) | {"pareto": {"widths": [2]}}).relative_to(tmp_path)
    ) as directory:
        assert directory.root == tmp_path / "run"
        directory.frozen.write_text("{}")  # a run that has begun
    with (
        pytest.raises(ValueError, match=r"it differs in .*labels\.kind"),
        opened_run(parse_config(changed("labels", {"kind": "top_k", "k": 2})).relative_to(tmp_path)),
    ):
        pass
