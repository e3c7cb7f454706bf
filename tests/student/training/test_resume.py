"""A training that was killed goes on: the same weights bit by bit, wherever it was; what does not fit is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pytest
import small_trainings
from on_step import OnStep
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distilbeam.progress import Progress
from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.checkpoints import remove_finished
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.torchrun_folders import note_folder, own_folder, remove_noted
from distilbeam.student.training.train import train

SUPPORT = Path(small_trainings.__file__).parent


class Stop(Exception):  # noqa: N818 - no error
    """Ends a training where a test wants it to."""


def stop_at(step):
    def step_done(done, _total, _note):
        if done == step:
            raise Stop

    return OnStep(step_done)


@pytest.fixture
def vectors(tmp_path):
    return small_trainings.write_vectors(tmp_path / "labels")


def run(tmp_path, data, name="student", kind="vectors", step=None, seed=7, changes=None, **more):
    """Train, up to a step if one is given."""
    configs = small_trainings.settings(kind, **(changes or {}))
    progress = None if step is None else stop_at(step)
    try:
        return train(*configs, **{**data, **more}, directory=tmp_path / name, seed=seed, progress=progress)
    except Stop:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_killed_trainings_end_as_undisturbed_ones(kind, tmp_path):
    command = [sys.executable, SUPPORT / "kill_trainings.py", tmp_path, kind, "0", "2"]
    path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    undisturbed, *disturbed = (json.loads(line) for line in done.stdout.splitlines())
    assert undisturbed["killed"] == []
    assert undisturbed["left"] == []
    assert len(disturbed) == 3
    for found in disturbed:
        assert found["weights"] == undisturbed["weights"]
        assert found["history"] == undisturbed["history"]
        assert found["began"] == sorted(found["began"])
        assert found["left"] == [] or found["killed"][-1] == "after the student"
    killed = [place for found in disturbed for place in found["killed"]]
    assert {"between", "half written", "before the rename", "after the rename"} <= set(killed)
    steps = undisturbed["history"][0]["step"]
    went_on = [step for found in disturbed for step in found["began"] if step > 1]
    assert any((step - 1) % steps for step in went_on)  # some in the middle of an epoch


def test_a_checkpoint_is_whole_and_the_last_few_are_kept(tmp_path, vectors):
    run(tmp_path, vectors, step=9)
    found = sorted(path.name for path in (tmp_path / "student.training").iterdir())
    assert found == [".lock", "metrics.jsonl", "step-000000000006.safetensors", "step-000000000008.safetensors"]
    run(tmp_path, vectors, "one", step=9, changes={"keep": 1})
    assert len(list((tmp_path / "one.training").glob("step-*"))) == 1
    with safe_open(tmp_path / "student.training/step-000000000008.safetensors", "pt") as file:
        parts = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    assert parts == {"model", "best", "average", "optimizer", "generators0"}
    assert state["done"] == 8
    assert state["loader"]["position"] == 90
    assert len(state["history"]) == 1


class Told(Progress):
    """Keeps the epochs, in the order in which they came among the steps, and stops after a step."""

    def __init__(self, last=None):
        self.last, self.steps, self.epochs = last, [], []

    def step(self, done, total, note=""):  # noqa: ARG002
        self.steps.append(done)
        if done == self.last:
            raise Stop

    def epoch(self, number, figures):
        self.epochs.append((number, dict(figures), self.steps[-1] if self.steps else 0))


def test_epochs_are_told_again_when_a_training_goes_on(tmp_path, vectors):
    configs = small_trainings.settings("vectors")
    whole, stopped, rest = Told(), Told(19), Told()
    train(*configs, **vectors, directory=tmp_path / "undisturbed", seed=7, progress=whole)
    with pytest.raises(Stop):
        train(*configs, **vectors, directory=tmp_path / "student", seed=7, progress=stopped)
    train(*configs, **vectors, directory=tmp_path / "student", seed=7, progress=rest)
    steps = len(whole.steps) // 5
    assert [(number, at) for number, _, at in whole.epochs] == [(n, n * steps) for n in range(1, 6)]
    assert stopped.epochs == whole.epochs[: 19 // steps]
    assert rest.steps[0] == 19
    assert [(number, figures) for number, figures, _ in rest.epochs] == [(n, figures) for n, figures, _ in whole.epochs]
    assert [at for _, _, at in rest.epochs] == [0] * (18 // steps) + [at for _, _, at in whole.epochs[18 // steps :]]
    assert {"train_loss", "validation_nll", "validation_accuracy", "validation_ece"} <= set(whole.epochs[0][1])


def test_a_damaged_checkpoint_is_passed_over(tmp_path, vectors, caplog):
    undisturbed = run(tmp_path, vectors, "undisturbed")
    run(tmp_path, vectors, step=9)
    last = tmp_path / "student.training/step-000000000008.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.INFO, "distilbeam"):
        result = run(tmp_path, vectors)
    assert "step-000000000008.safetensors is damaged and passed over" in caplog.text
    assert "going on after step 6 of the training" in caplog.text
    assert small_trainings.weights(result.directory) == small_trainings.weights(undisturbed.directory)
    assert not (tmp_path / "student.training").exists()


def test_checkpoints_come_by_the_clock_as_well(tmp_path, vectors):
    run(tmp_path, vectors, step=3, changes={"checkpoint_steps": None})
    assert not list((tmp_path / "student.training").glob("step-*"))
    run(tmp_path, vectors, "often", step=3, changes={"checkpoint_steps": None, "checkpoint_seconds": 0})
    assert len(list((tmp_path / "often.training").glob("step-*"))) == 2


def test_estimated_weights_come_back_in_the_middle_of_an_epoch(tmp_path, vectors):
    """They are estimated before epoch 3, and cannot be estimated again after its first step."""
    undisturbed = run(tmp_path, vectors, "undisturbed")
    steps = int(undisturbed.metrics["steps"] / undisturbed.metrics["epochs"])
    run(tmp_path, vectors, step=2 * steps + 3)
    name = f"step-{2 * steps + 2:012d}.safetensors"
    assert load_file(tmp_path / "student.training" / name)["weights/rows"].mean() == pytest.approx(1, abs=1e-6)
    assert small_trainings.weights(run(tmp_path, vectors).directory) == small_trainings.weights(undisturbed.directory)


def test_the_best_epoch_is_remembered(tmp_path, vectors):
    """A learning rate that does harm: the best epoch is over when the training is cut off."""
    harmful = {"lr": 1.0, "schedule": "constant", "ema": None, "epochs": 4}
    for seed in range(20):  # in which epoch it did least harm is anyone's guess
        undisturbed = run(tmp_path, vectors, f"undisturbed-{seed}", changes=harmful, seed=seed)
        if undisturbed.metrics["best_epoch"] < 4:
            break
    assert undisturbed.metrics["best_epoch"] < 4
    steps = int(undisturbed.metrics["steps"] / 4)
    run(tmp_path, vectors, step=4 * steps - 1, changes=harmful, seed=seed)
    result = run(tmp_path, vectors, changes=harmful, seed=seed)
    assert small_trainings.weights(result.directory) == small_trainings.weights(undisturbed.directory)


def test_metrics_have_no_line_twice(tmp_path, vectors):
    run(tmp_path, vectors, step=21, changes={"log_steps": 3})
    with (tmp_path / "student.training/metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')  # a line that was being written
    result = run(tmp_path, vectors, changes={"log_steps": 3})
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch" not in line] == [*range(3, 41, 3)]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2, 3, 4, 5]
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines if "epoch" not in line)
    assert all(line["examples_per_s"] > 0 and line["seconds"] > 0 and line["lr"] >= 0 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_another_training_is_refused(tmp_path, vectors):
    run(tmp_path, vectors, step=5)
    with pytest.raises(ValueError, match=r"training.lr \(0.003 there, 0.01 now\). Set these back to go on with it, or"):
        run(tmp_path, vectors, changes={"lr": 0.01})
    with pytest.raises(ValueError, match=r"differs in seed \(7 there, 8 now\)"):
        run(tmp_path, vectors, seed=8)
    with pytest.raises(ValueError, match="differs in validation "):
        run(
            tmp_path,
            vectors,
            validation=vectors["validation"].slice(1),
            validation_teacher=vectors["validation_teacher"][1:],
        )
    other = small_trainings.write_vectors(tmp_path / "other", kind="top_k")
    with pytest.raises(ValueError, match="the state's dataset must be that of this dataset"):
        run(tmp_path, vectors, soft_labels=other["soft_labels"])
    assert run(tmp_path, vectors, changes={"checkpoint_seconds": 5, "keep": 3, "log_steps": 1}) is not None


def test_two_trainings_of_one_student_are_not_mixed(tmp_path, vectors):
    refusals = []

    def meanwhile(done, _total, _note):
        if done == 2:
            with pytest.raises(
                ValueError, match=r"student.training is being worked on by another process; wait for it"
            ) as e:
                run(tmp_path, vectors)
            refusals.append(e.value)

    configs = small_trainings.settings("vectors", epochs=1)
    train(*configs, **vectors, directory=tmp_path / "student", seed=7, progress=OnStep(meanwhile))
    assert len(refusals) == 1


def test_a_newer_format_is_refused(tmp_path, vectors):
    run(tmp_path, vectors, step=5)
    for path in (tmp_path / "student.training").glob("step-*"):
        save_file(load_file(path), path, {"state": json.dumps({"format_version": 2})})
    with pytest.raises(ValueError, match=r"has format version 2, this release reads 1; go on with the release that"):
        run(tmp_path, vectors)


def test_what_a_killed_process_left_is_swept(tmp_path, vectors):
    run(tmp_path, vectors, step=5)
    partial = tmp_path / "student.training/.step-000000000006.safetensors.1.ab.tmp"
    partial.write_bytes(b"half")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished.training").mkdir()
    remove_finished(tmp_path)
    assert not (tmp_path / "finished.training").exists()
    assert partial.exists()  # its student is not there yet
    run(tmp_path, vectors, step=6)
    assert not partial.exists()


def test_a_loss_that_is_not_a_number_stops_with_its_batch(tmp_path, vectors):
    labelled = vectors["labelled"]
    x = labelled["x"].combine_chunks()
    values = x.flatten().to_numpy().copy()
    values[4 * 11 : 4 * 12] = 9e17
    broken = pa.FixedSizeListArray.from_arrays(pa.array(values), 4)
    table = labelled.set_column(labelled.column_names.index("x"), "x", broken)
    student = StudentConfig(kind="small_trainings:Cubed", input={"columns": ["x"]})
    with pytest.raises(
        ValueError,
        match=r"became (nan|inf) in step \d+ of \d+; a labelled example has 9e\+17 in its input; correct it .* rows are in",
    ) as e:
        train(student, TrainConfig(), **{**vectors, "labelled": table}, directory=tmp_path / "student", seed=0)
    kept = load_file(tmp_path / "student.training/stopped-at.safetensors")
    assert str(tmp_path / "student.training/stopped-at.safetensors") in str(e.value)
    assert int((kept["hard.inputs"] > 1e17).all(1).sum()) == 1
    assert kept["soft.inputs"].shape[1:] == (4,)
    assert {"soft.teacher_logprobs", "soft.row", "hard.classes"} <= set(kept)
    assert not (tmp_path / "student").exists()


def test_a_gradient_that_is_not_a_number_stops_before_it_is_kept(tmp_path, vectors):
    student = StudentConfig(kind="small_trainings:EndlessGradient", input={"columns": ["x"]})
    training = TrainConfig(checkpoint_steps=1)
    with pytest.raises(ValueError, match=r"the norm of the gradient became nan in step 1 of \d+; lower training.lr"):
        train(student, training, **vectors, directory=tmp_path / "student", seed=0)
    assert {path.name for path in (tmp_path / "student.training").iterdir()} == {
        ".lock",
        "metrics.jsonl",
        "stopped-at.safetensors",
    }


@pytest.mark.slow
def test_tensorboard_has_the_figures(tmp_path, vectors, monkeypatch):
    pytest.importorskip("tensorboard")
    # TensorBoard's own way to do without TensorFlow, whose import takes longer than all of this
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))
    script = (
        "import sys, types\n"
        "sys.modules['tensorboard.compat.notf'] = types.ModuleType('notf')\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "events = EventAccumulator(sys.argv[1])\n"
        "events.Reload()\n"
        "print([(e.step, round(e.value, 4)) for e in events.Scalars('validation_nll')])\n"
    )
    result = run(tmp_path, vectors, changes={"tensorboard": True, "epochs": 2})
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    command = [sys.executable, "-c", script, result.directory / "tensorboard"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    assert eval(found) == [(line["step"], round(line["validation_nll"], 4)) for line in lines]  # noqa: S307


def test_tensorboard_that_is_not_installed_is_named(tmp_path, vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(
        ValueError, match=r"needs tensorboard, which is not installed: pip install 'distilbeam\[tensorboard\]'"
    ):
        run(tmp_path, vectors, changes={"tensorboard": True})
    assert not (tmp_path / "student.training").exists()


def test_the_student_remembers_how_it_was_trained(tmp_path, vectors):
    result = run(tmp_path, vectors)
    extra = load_student(result.directory).extra
    assert extra["training"]["ema"] == 0.9
    assert extra["metrics"]["best_epoch"] == result.metrics["best_epoch"]


def test_what_a_killed_process_left_beside_the_training_is_removed_by_the_next(tmp_path, vectors):
    for name in (".student.3f2a.tmp", ".student-2.3f2a.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    run(tmp_path, vectors)
    assert not (tmp_path / ".student.3f2a.tmp").exists()
    assert (tmp_path / ".student-2.3f2a.tmp").exists()  # another student's


def test_the_folder_of_a_killed_torchrun_is_removed_and_no_other(tmp_path, monkeypatch):
    folder, work = tmp_path / "torchelastic_a1", tmp_path / "student.training"
    (folder / "run_1" / "attempt_0" / "0").mkdir(parents=True)
    work.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "run_1" / "attempt_0" / "0" / "error.json"))
    note_folder(work)
    remove_noted(work)
    assert folder.exists()  # its launcher, our parent, is at work
    said = json.loads((work / "launcher.json").read_text())
    assert said["folder"] == str(folder)
    (work / "launcher.json").write_text(
        json.dumps(said | {"started": said["started"] - 100})
    )  # its number went to another
    remove_noted(work)
    assert not folder.exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (work / "launcher.json").write_text(json.dumps(said | {"folder": str(other), "started": 0}))
    remove_noted(work)
    assert other.exists()
    (work / "launcher.json").write_text("{")
    remove_noted(work)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(other / "run_1" / "attempt_0" / "0" / "error.json"))
    assert own_folder() is None
