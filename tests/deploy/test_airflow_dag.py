"""The Airflow DAGs in Airflow: their tasks, the day that a night's run is of, the asset by which the second follows the first.

Airflow wants an environment of its own: AIRFLOW_PYTHON names the interpreter of one, of Airflow 2.7 or newer.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DAG = Path(__file__).resolve().parents[2] / "deploy" / "airflow" / "nightly_labelling.py"
LOAD = """
import json, runpy, sys
import pendulum
from airflow.timetables.base import TimeRestriction
made = runpy.run_path(sys.argv[1])
dag, student = made["dag"], made["student_dag"]
night = TimeRestriction(earliest=pendulum.datetime(2026, 11, 20), latest=None, catchup=True)
run = dag.timetable.next_dagrun_info(last_automated_data_interval=None, restriction=night)
by_hand = dag.timetable.infer_manual_data_interval(run_after=pendulum.datetime(2026, 11, 21, 9))
jinja = dag.get_template_env()
def conditions(timetable):
    return (getattr(timetable, "asset_condition", None) or timetable.dataset_condition).objects  # Airflow 3, 2
def rendered(task, start):
    variables = {"value": {"distilbeam_home": "/srv"}}
    return jinja.from_string(task.bash_command).render(data_interval_start=start, var=variables)
print(json.dumps({
    "run_after": run.run_after.isoformat(),
    "tasks": {t.task_id: [sorted(t.downstream_task_ids), t.retries] for t in dag.tasks},
    "commands": {t.task_id: rendered(t, run.data_interval.start) for t in dag.tasks},
    "by hand": rendered(dag.tasks[0], by_hand.start),
    "outlets": {t.task_id: [one.uri for one in t.outlets] for t in dag.tasks},
    "waits for": [one.uri for one in conditions(student.timetable)],
    "student": {t.task_id: rendered(t, None) for t in student.tasks},
}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = os.environ.get("AIRFLOW_PYTHON") or (sys.executable if find_spec("airflow") else None)
    if python is None or shutil.which(python) is None:
        pytest.skip("Airflow is not installed, and AIRFLOW_PYTHON names no interpreter that has it")
    home = tmp_path_factory.mktemp("airflow")
    environment = {**os.environ, "AIRFLOW_HOME": str(home), "PYTHONPATH": "", "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    run = subprocess.run(
        [python, "-c", LOAD, str(DAG)], env=environment, cwd=home, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return told


def test_the_dag_is_one_chain_whose_check_is_not_repeated(loaded: dict[str, Any]) -> None:
    assert loaded["tasks"] == {
        "ingest": [["plan"], 3],
        "plan": [["label"], 3],
        "label": [["verify"], 3],
        "verify": [[], 0],
    }


def test_the_night_ingests_the_day_that_has_ended(loaded: dict[str, Any]) -> None:
    assert loaded["run_after"] == "2026-11-21T02:15:00+00:00"
    expected = "cd /srv && .venv/bin/distilbeam ingest incoming/2026-11-20 --out pool/2026-11-20 --format jsonl --id id"
    assert loaded["commands"]["ingest"] == expected
    assert loaded["by hand"] == expected  # started at nine in the morning
    assert "{{" not in "".join(loaded["commands"].values())


def test_checked_labels_are_an_asset_that_starts_the_training(loaded: dict[str, Any]) -> None:
    labels = ["file:///srv/distilbeam/labelling/labels"]
    assert loaded["outlets"] == {"ingest": [], "plan": [], "label": [], "verify": labels}
    assert loaded["waits for"] == labels
    train = "cd /srv && .venv/bin/distilbeam launch training.toml --set data.directory=students/$(date +%F)"
    assert loaded["student"] == {"train": train}
