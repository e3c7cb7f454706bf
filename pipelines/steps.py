"""The order of a run's steps, and the command that carries them out.

regress embeddings on a sentence encoder, where there is one; train student 0; ask the teacher about the validation (and the test) set
for each round:   select -> label -> train
last training: an ensemble's pseudo-labels for what was not bought, and the validation rows
compare with as many uniformly chosen labels; evaluate; report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.extras import require_extras
from distilbeam.pipelines.config import RunConfig, TokenRunConfig, load_run_config, parse_run_config
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.jobs.cross_fitting import last_training
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.distillation import Job
from distilbeam.pipelines.jobs.final_result import is_wanted
from distilbeam.pipelines.jobs.freeze import freeze
from distilbeam.pipelines.jobs.opening import opened_run
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.jobs.set_notes import notes_on, require_different_sets
from distilbeam.pipelines.jobs.step import Step as Step
from distilbeam.pipelines.language.figures import UNIT
from distilbeam.pipelines.language.job import TokenJob
from distilbeam.pipelines.language.report import write_token_report
from distilbeam.pipelines.language.run import TokenRun
from distilbeam.pipelines.language.steps import token_steps
from distilbeam.pipelines.needs import needs_of
from distilbeam.pipelines.report.html import write_report
from distilbeam.pipelines.report.metrics import are_current, write_results
from distilbeam.progress import Progress
from distilbeam.storage.files import read_json


def steps_of(job: Job) -> list[Step]:
    """List the steps of a run in their order."""
    where, config = job.directory, job.config
    budget, rounds = config.selection.budget, config.run.rounds
    trained = where.trained(rounds)
    steps = [*_encode(job), *_train(job, trained, 0), *(_ask(job, name) for name in _asked(config))]
    for r in range(rounds):
        steps += [
            Step("select", r, f"round {r + 1}: choose {budget:,} examples", where.picks(r), partial(job.select, r)),
            Step("label", r, f"round {r + 1}: ask the teacher", where.summary(where.labels(r)), partial(job.label, r)),
            *_train(job, trained, r + 1),
        ]
    if is_wanted(job.run):
        steps += [Step("train", None, *part) for part in last_training(job.run, job.phases).parts()]
    if config.selection.compare_uniform:
        title = f"compare with {budget * rounds:,} uniformly chosen labels"
        steps.append(Step("compare", None, title, job.run.comparison.student(1), job.compare))
    current = partial(are_current, job.run)
    return [
        *steps,
        Step("evaluate", None, "evaluate", where.metrics, partial(write_results, job.run), current),
        Step("report", None, "draw the report", where.report / "report.html", partial(write_report, where), current),
    ]


def _train(job: Job, trained: Sequence[int], number: int) -> list[Step]:
    if number not in trained:
        return []
    title = f"round {number}: train student {number}" if number else "train student 0 on the labelled set"
    return [Step("train", number, title, job.directory.student(number), partial(job.train, number))]


def _encode(job: Job) -> list[Step]:
    if job.config.student.init != "encoder":
        return []
    title = "regress embeddings on the sentence encoder"
    return [Step("encode", None, title, job.run.encoder_start(job.config.student).table, job.encode)]


def _asked(config: RunConfig) -> list[str]:
    """Name the sets that the teacher is asked about: the fine-tuning of blind distillation needs the labelled one."""
    needed = {
        "validation": True,
        "test": config.data.test is not None,
        "labelled": config.training.finetune is not None,
    }
    return [name for name, wanted in needed.items() if wanted]


def _ask(job: Job, name: str) -> Step:
    commit = job.directory.summary(job.directory.asked(name))
    return Step("ask", None, f"ask the teacher about the {name} set", commit, partial(job.ask, name))


def job_of(config: RunConfig | TokenRunConfig, directory: RunDirectory, options: PipelineOptions) -> Job | TokenJob:
    """Give what carries out the steps of a run in its directory."""
    if isinstance(config, TokenRunConfig):
        return TokenJob(TokenRun(config, directory), options)
    return Job(Run(config, directory), options)


def every_step(job: Job | TokenJob) -> list[Step]:
    """List the steps of a run of either kind in their order."""
    return token_steps(job) if isinstance(job, TokenJob) else steps_of(job)


def run(
    config: RunConfig | TokenRunConfig | Mapping[str, Any] | str | Path,
    *,
    base: Path | str | None = None,
    beam_flags: Sequence[str] = (),
    display: Display | None = None,
    until: tuple[str, int | None] | None = None,
    check_content: bool = False,
) -> Path:
    """Carry out a run, or what is left of it.

    A run is a directory: what is committed there is never done again, so that the same call after a crash goes on where
    the former one stopped, and after the end does nothing.

    Args:
      config: the configuration, or plain data for one, or the path of its TOML file.
      base: directory that the configuration's relative paths are relative to; by default the file's, else the working
        directory.
      beam_flags: Beam's own options, such as `--runner=DataflowRunner`.
      display: where to show progress; nothing is shown without one.
      until: name and round of the last step to do; all steps without it.
      check_content: read all files of the pool to find out whether they changed, not only those that were touched since.

    Returns:
      The run directory.

    Raises:
      ValueError: settings or data that are not valid, or a run directory of another configuration; the message is a
        sentence.
      PhaseError: work that failed in every attempt.
    """
    display = display or Display.silent()
    if isinstance(config, str | Path):
        config = load_run_config(Path(config))
        if base is not None:
            config = parse_run_config(config.dump())
    elif isinstance(config, Mapping):
        config = parse_run_config(config)
    config = config.relative_to(Path(base or ".").resolve())
    require_extras(needs_of(config))
    options = pipeline_options(beam_flags)
    with opened_run(config) as directory:
        job = job_of(config, directory, options)
        if (sentence := directory.sentence(config.run.rounds)) is not None:
            display.say(sentence)
        if config.engine.retry:
            job.reopen_failed()
        steps = _up_to(every_step(job), until)
        todo = [step for step in steps if not step.done]
        if directory.moved:
            freeze(job.run, check_content)
            directory.record(config)
        if not todo:
            display.say(f"Nothing to do: all {len(steps)} steps are done in {directory.root}")
            return directory.root
        if len(todo) < len(steps):
            display.say(
                f"Going on in {directory.root}: {len(steps) - len(todo)} of {len(steps)} steps are done already"
            )
        with display.step("read the data and load the teacher"):
            freeze(job.run, check_content)
        if todo[0] is steps[0] and isinstance(job, Job):
            require_different_sets(job.run.inputs)
            for note in notes_on(job.run.inputs, job.run.config.data.id):
                display.say(f"note: {note}")
        for step in todo:
            with display.step(step.title) as progress:
                step.do(progress)
    return directory.root


def redraw_report(root: Path) -> None:
    """Draw the report of a finished run again."""
    where = RunDirectory(root)
    of_tokens = read_json(where.metrics).get("unit") == UNIT
    (write_token_report if of_tokens else write_report)(where, Progress())


def _up_to(steps: list[Step], until: tuple[str, int | None] | None) -> list[Step]:
    if until is None:
        return steps
    name, number = until
    matching = [i for i, step in enumerate(steps) if step.name == name and number in (None, step.round)]
    if not matching:
        rounds = sorted({step.round for step in steps if step.name == name and step.round is not None})
        assert number is not None  # every run has a step of each name
        allowed = f"between {rounds[0]} and {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
        fewer = number < rounds[0]  # of a student that learns from the labels that are there
        way_out = f"; --set run.rounds={number} learns from the labels of fewer rounds" if fewer else ""
        raise ValueError(f"--round must be {allowed} for {name}, got {number}{way_out}")
    pending = [i for i in matching if not steps[i].done]
    return steps[: (pending or matching[-1:])[0] + 1]
