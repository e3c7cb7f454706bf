"""Several processes train one student: the same weights in all of them, and those of one process up to rounding."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_trainings
import tomli_w
from safetensors.torch import load_file

from distilbeam.student.checkpoint import load_student
from distilbeam.student.training.distributed import Processes, joined_processes
from distilbeam.student.training.launch import launch, main, read_config

SUPPORT = Path(small_trainings.__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
}

# plain: nothing in it depends on how rows are dealt to processes; sgd: it does not blow up rounding as AdamW does
PLAIN = {"optimizer": "sgd", "objective": "distill", "reestimate_epochs": None, "ema": None, "augment": {}}
NO_DROPOUT = {**PLAIN, "dropout": 0.0, "epochs": 3}
# 85 soft-labelled rows in steps of 12 leave one row for the last, of which one process at least gets none
ODD = {"kind": "vectors", "rows": 85, "changes": {**NO_DROPOUT, "batch_size": 12}, "data": {"labelled": None}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train with one, two and three processes; give the directory and what each training printed."""
    directory = tmp_path_factory.mktemp("processes")
    everything = {"kind": "vectors", "rows": 90}
    jobs = [
        *({"name": f"odd-{n}", "processes": n, **ODD} for n in (1, 2, 3)),
        *({"name": f"mixed-{n}", "processes": n, "kind": "vectors", "rows": 90, "changes": NO_DROPOUT} for n in (1, 2)),
        {
            "name": "fewer",
            "processes": 2,
            "then": 1,
            "kill_at": 13,
            "kind": "vectors",
            "rows": 90,
            "changes": NO_DROPOUT,
        },
        {"name": "everything", "processes": 2, **everything},
        {"name": "killed", "processes": 2, "kill_at": 21, **everything},
        {"name": "images", "processes": 2, "kind": "images", "rows": 61},
    ]
    command = [sys.executable, SUPPORT / "several_processes.py", directory, json.dumps(jobs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return directory, {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}, done.stderr


def weights(directory: Path) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in load_file(directory / "model.safetensors").values()])


@pytest.mark.slow
def test_every_process_has_the_same_weights_after_every_epoch(trained):
    _, found, errors = trained
    for name, training in found.items():
        first, *others = training["epochs"]
        assert set(training["statuses"][-1]) == {0}, errors
        assert len(first) >= 3
        assert all(other == first[: len(other)] for other in others), name
        assert name == "fewer" or all(len(other) == len(first) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("several", "one"), [("odd-2", "odd-1"), ("odd-3", "odd-1"), ("mixed-2", "mixed-1"), ("fewer", "mixed-1")]
)
def test_several_processes_learn_what_one_learns(several, one, trained):
    """Sums of float32 in another order: 24 steps of at most 4 roundings of 6e-8 each, on weights of size 1."""
    directory, _, _ = trained
    difference = np.abs(weights(directory / several) - weights(directory / one)).max()
    assert difference < 24 * 4 * 6e-8 * np.abs(weights(directory / one)).max()
    assert np.abs(weights(directory / "mixed-1") - weights(directory / "odd-1")).max() > 1e-3  # it could fail


@pytest.mark.slow
def test_killed_processes_go_on_with_the_same_weights(trained):
    directory, found, _ = trained
    assert found["killed"]["statuses"] == [[-signal.SIGKILL] * 2, [0, 0]]
    assert found["killed"]["epochs"][0] == found["everything"]["epochs"][0]
    np.testing.assert_array_equal(weights(directory / "killed"), weights(directory / "everything"))
    names = [path.name for path in directory.glob("*.training")]
    assert names == []


@pytest.mark.slow
def test_torchrun_launches_a_training(tmp_path, capsys):
    data = small_trainings.write_vectors(tmp_path / "labels", 90)
    for name in ("labelled", "validation"):
        pq.write_table(data[name], tmp_path / f"{name}.parquet")
    student, _ = small_trainings.settings("vectors")
    config = {
        "data": {
            "soft_labels": ["labels"],
            "labelled": "labelled.parquet",
            "validation": "validation.parquet",
            "classes": list(small_trainings.NAMES),
            "directory": "student",
            "seed": 7,
        },
        "student": student.model_dump(mode="json", exclude_defaults=True),
        "training": {"epochs": 1, "batch_size": 16},
    }
    (tmp_path / "training.toml").write_text(tomli_w.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "distilbeam", "launch", tmp_path / "training.toml", "--set", "training.epochs=2"]
    done = subprocess.run(
        [*launcher, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count(str(tmp_path / "student")) == 1, "one of the two processes tells the result"
    figures = [tuple(line.split()) for line in lines[lines.index(str(tmp_path / "student")) + 1 :]]
    assert {("epochs", "2"), ("soft_rows", "90"), ("hard_rows", "30")} <= set(figures)
    assert len(pq.read_table(tmp_path / "labelled.parquet")) == 30
    assert (tmp_path / "student/metrics.jsonl").exists()
    with pytest.raises(SystemExit, match="2"):
        main(tmp_path / "training.toml")
    assert "already holds a student" in capsys.readouterr().err


def test_blind_distillation_is_launched(tmp_path):
    data = small_trainings.write_vectors(tmp_path / "pool", 90)
    small_trainings.write_vectors(tmp_path / "answers", 30)
    pq.write_table(data["labelled"], tmp_path / "labelled.parquet")
    student, _ = small_trainings.settings("vectors")
    config = {
        "data": {
            "soft_labels": ["pool"],
            "mixing_weights": [1.0],
            "labelled": "labelled.parquet",
            "labelled_answers": ["answers"],
            "classes": list(small_trainings.NAMES),
        },
        "student": student.model_dump(mode="json", exclude_defaults=True),
        "training": {"epochs": 2, "batch_size": 16, "finetune": {"epochs": 1}},
    }
    path = tmp_path / "training.toml"
    path.write_text(tomli_w.dumps(config))
    result = launch(read_config(path, []), tmp_path)
    blind = load_student(tmp_path / "student.blind").extra["metrics"]
    assert (blind["epochs"], blind["soft_rows"], blind["hard_rows"]) == (2, 90, 0)
    assert [result.metrics[name] for name in ("epochs", "soft_rows", "hard_rows")] == [1, 30, 30]
    config["training"].pop("finetune")
    path.write_text(tomli_w.dumps(config))
    with pytest.raises(ValueError, match=r"data.labelled_answers are for the second phase of blind distillation"):
        launch(read_config(path, ['data.directory="other"']), tmp_path)
    with pytest.raises(ValueError, match=r"training.reestimate_epochs needs the teacher's answers"):
        launch(read_config(path, ["training.reestimate_epochs=1", 'training.objective="weighted"']), tmp_path)


def test_settings_of_a_launch_are_checked(tmp_path):
    path = tmp_path / "training.toml"
    path.write_text('[data]\nclasses = ["a", "b"]\n[student]\nkind = "mlp"\ninput = { columns = ["x"] }\n')
    assert read_config(path, ["training.lr=0.5", 'data.directory="there"']).training.lr == 0.5
    with pytest.raises(ValueError, match=r"^training.lrr is not a setting; did you mean training.lr\?$"):
        read_config(path, ["training.lrr=0.5"])
    nested = read_config(path, ["training.device=cpu", "student.input.max_length=9"])
    assert (nested.training.device, nested.student.input.max_length) == ("cpu", 9)


def test_one_process_needs_no_group():
    with joined_processes("cpu") as processes:
        assert (processes.rank, processes.size, processes.first) == (0, 1, True)
        assert processes.sum(1.5) == 1.5
        assert processes.from_first("x") == "x"
        assert processes.gather("x") == ["x"]
        processes.wait()
    assert isinstance(processes, Processes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:77", "device must be one that is here, such as cpu, got 'cuda:77': "),
        ("nonsense", "device must be one that is here, such as cpu, got 'nonsense': "),
        ("tpu", "device 'tpu' needs the package torch_xla, which is not installed; choose cpu or cuda"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name, message):
    with pytest.raises(ValueError, match=message), joined_processes(name):
        pass
