"""What deploy/ says is true: files parse, and the commands, options and parameters in them exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import typer

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.transforms.stream_job import parser

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


CALL = re.compile(r"(?<![\w/-])(\.venv/bin/)?distilbeam [a-z]")


def commands_of(text: str) -> list[str]:
    """Find the calls of distilbeam in a text, each on a line of its own."""
    found = ((line, CALL.search(line)) for line in text.replace("\\\n", " ").splitlines())
    calls = [line[match.start() :] for line, match in found if match]
    return [call.split("  #")[0].split(">>")[0].strip().removesuffix("&") for call in calls]


def dag_commands() -> dict[str, str]:
    tree = ast.parse((DEPLOY / "airflow" / "nightly_labelling.py").read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "COMMANDS"]  # type: ignore[attr-defined]
    commands: dict[str, str] = ast.literal_eval(values[0])
    return commands


def all_commands() -> Iterator[str]:
    yield from (line.strip() for line in commands_of((DEPLOY / "README.md").read_text()) if "`" not in line)
    yield from commands_of((DEPLOY / "crontab").read_text())
    yield from dag_commands().values()


def test_every_command_and_option_exists() -> None:
    found = list(all_commands())
    assert len(found) >= 11
    tool: Any = typer.main.get_command(app)
    for text in found:
        words = shlex.split(re.sub(r"\{\{.*?\}\}", "2026-01-01", text))[1:]
        own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        command = tool.commands[own[0]]
        command.make_context(own[0], own[1:])  # fails on an option or a number of arguments that it does not take
        if flags:
            pipeline_options(flags)


def test_the_settings_in_the_page_exist() -> None:
    overrides = re.findall(r"--set (\S+=[^\s`,)]+)", (DEPLOY / "README.md").read_text())
    assert len(overrides) == 6
    choice = overrides[3:]
    for group in (overrides[:1], overrides[1:2], overrides[2:3], choice):
        assert isinstance(load_any_config(DEPLOY / "nightly.toml", group), LabelConfig)


def test_the_streaming_command_exists() -> None:
    line = next(line for line in (DEPLOY / "README.md").read_text().splitlines() if "stream_job --config" in line)
    words = shlex.split(line)
    own, flags = parser().parse_known_args(words[3:])
    assert (ROOT / own.config).exists()
    pytest.importorskip("apitools", reason="Dataflow's options need the extra gcp")
    assert pipeline_options(flags)


@pytest.mark.parametrize("path", ["nightly.toml", "dataflow/job.toml", "dataflow/nightly.toml"])
def test_configurations_are_valid(path: str) -> None:
    config = load_any_config(DEPLOY / path)
    assert isinstance(config, LabelConfig)
    lines = (DEPLOY / path).read_text().splitlines()
    switched_on = "\n".join(re.sub(r"^# (?=\[|\w+ = )", "", line) for line in lines)
    if switched_on != "\n".join(lines):
        assert LabelConfig.model_validate(tomllib.loads(switched_on)).watch.budget == 1000


def test_the_flex_template_has_the_jobs_options() -> None:
    metadata = json.loads((DEPLOY / "dataflow" / "metadata.json").read_text())
    options = {action.dest: action for action in parser()._actions if action.dest != "help"}
    parameters = {parameter["name"]: parameter for parameter in metadata["parameters"]}
    assert set(parameters) == set(options)
    for name, parameter in parameters.items():
        assert parameter["isOptional"] == (not options[name].required), name
        for field in ("label", "helpText"):
            assert parameter[field]
        for pattern in parameter.get("regexes", []):
            re.compile(pattern)
    examples = {
        "config": "/template/job.toml",
        "source": "pubsub:projects/p/subscriptions/s",
        "out": "gs://bucket/labels",
        "window_s": "0.5",
        "shards": "16",
    }
    for name, value in examples.items():
        assert all(re.search(pattern, value) for pattern in parameters[name]["regexes"]), name


def test_the_schedule_names_parameters_that_exist() -> None:
    script = (DEPLOY / "dataflow" / "schedule.sh").read_text()
    subprocess.run(["bash", "-n", str(DEPLOY / "dataflow" / "schedule.sh")], check=True)
    body = script.split("<<JSON\n")[1].split("\nJSON")[0]
    launch = json.loads(re.sub(r"\$\{\w+\}", "x", body))["launchParameter"]
    names = {action.dest for action in parser()._actions}
    for name in launch["parameters"]:
        if name not in names:
            pipeline_options([f"--{name}=x"])
    assert set(launch["environment"]) <= {"maxWorkers", "tempLocation", "serviceAccountEmail"}
    cron = re.search(r'--schedule="([^"]+)"', script)
    assert cron is not None
    assert len(cron[1].split()) == 5
    assert (ROOT / re.search(r"--metadata-file=(\S+)", script)[1]).exists()  # type: ignore[index]


def test_the_crontab_has_five_fields_and_a_command() -> None:
    lines = [line for line in (DEPLOY / "crontab").read_text().splitlines() if re.match(r"[\d*]", line)]
    assert len(lines) == 1
    assert re.match(r"\d+ \d+ \* \* \* cd /\S+ && flock ", lines[0])


def test_the_image_has_what_it_copies_and_the_versions_that_are_tested() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
    assert stages == ["worker", "template-base", "launcher"]
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert source == "dist/*.whl" or (ROOT / source).exists(), source
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert re.search(r"ARG BEAM_VERSION=(\S+)", text)[1] == pins["apache-beam"]  # type: ignore[index]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"whl\)\[([\w,]+)\]", text)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert f"/distilbeam-{project['version']}-py3-none-any.whl" in (DEPLOY / "README.md").read_text()


def test_the_launcher_starts_the_streaming_job() -> None:
    out = subprocess.run(
        [sys.executable, str(DEPLOY / "dataflow" / "launch.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--window_s" in out.stdout


def test_the_dag_compiles_and_is_one_chain() -> None:
    path = DEPLOY / "airflow" / "nightly_labelling.py"
    compile(path.read_text(), str(path), "exec")
    assert list(dag_commands()) == ["ingest", "plan", "label", "verify"]


@pytest.mark.parametrize(
    ("zone", "moment", "expected"),
    [
        ("UTC", datetime(2026, 11, 20, 2, 15, tzinfo=UTC), "2026-11-20"),
        ("Asia/Tokyo", datetime(2026, 11, 19, 17, 15, tzinfo=UTC), "2026-11-20"),  # 02:15 there
        ("America/New_York", datetime(2026, 11, 20, 7, 15, tzinfo=UTC), "2026-11-20"),
    ],
)
def test_the_day_is_the_zones(zone: str, moment: datetime, expected: str) -> None:
    tree = ast.parse((DEPLOY / "airflow" / "nightly_labelling.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    names: dict[str, Any] = {"datetime": datetime, "ZoneInfo": ZoneInfo, "ZONE": zone}
    exec(compile(ast.Module([function], []), "day", "exec"), names)
    assert names["day"](moment) == expected


CRONTAB = """#!/bin/sh
if [ "$1" = -l ]; then
  test -f "$HOME/table" || { echo "no crontab for you" >&2; exit 1; }
  cat "$HOME/table"
else
  cat > "$HOME/.new" && mv "$HOME/.new" "$HOME/table"
fi
"""


@pytest.mark.parametrize("before", [None, "MAILTO=me\n0 1 * * * backup\n", ""])
def test_the_crontab_is_added_to_once(tmp_path: Path, before: str | None) -> None:
    line = next(text.strip() for text in (DEPLOY / "README.md").read_text().splitlines() if "| crontab -" in text)
    fake = tmp_path / "crontab"
    fake.write_text(CRONTAB)
    fake.chmod(0o755)
    if before is not None:
        (tmp_path / "table").write_text(before)
    for _ in range(2):
        environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
        subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "table").read_text() == (before or "") + (DEPLOY / "crontab").read_text()


def test_every_file_is_explained() -> None:
    page = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            name = str(path.relative_to(DEPLOY))
            assert name in page or f"({path.parent.name})" in page or path.name in page, name


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/pipelines/engine/test_runners.py compares the bytes of every runner
def test_a_runner_is_checked_by_the_bytes_that_it_writes(tmp_path: Path) -> None:
    flags = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]
    script = [sys.executable, str(DEPLOY / "check_runner.py")]
    done = subprocess.run([*script, str(tmp_path / "check"), "--", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    shards = len(list((tmp_path / "check" / "there" / "labels").glob("*.parquet")))
    assert shards > 5
    assert done.stdout.endswith(f"The same {shards} shards, byte for byte.\n")
    usage = subprocess.run([*script, "--runner=x"], capture_output=True, text=True, check=False)
    assert usage.stderr.startswith("usage: python ")
    assert usage.returncode == 1
