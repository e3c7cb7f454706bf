"""The order of the steps of a run of a language model.

write student 0; ask the teacher about the validation (and the test) blocks
for each round:   select -> label -> train
compare with the text alone, and with as many uniformly chosen blocks; evaluate; report
"""

from __future__ import annotations

from functools import partial

from distilbeam.pipelines.jobs.step import Step
from distilbeam.pipelines.language.figures import are_current, write_figures
from distilbeam.pipelines.language.job import TokenJob
from distilbeam.pipelines.language.report import write_token_report


def token_steps(job: TokenJob) -> list[Step]:
    """List the steps of a run of a language model in their order."""
    where, config, inputs = job.directory, job.config, job.run.inputs
    rounds, budget = config.run.rounds, inputs.budget
    what = "as its folder has it" if config.student.model is not None else "of random weights"
    steps = [Step("train", 0, f"write student 0, {what}", where.student(0), partial(job.train, 0))]
    for name in inputs.held_out:
        title = f"ask the teacher about the {name} blocks"
        steps.append(Step("ask", None, title, where.summary(where.asked(name)), partial(job.ask, name)))
    for r in range(rounds):
        chosen = f"choose {budget:,} blocks ({budget * inputs.length:,} tokens)"
        steps += [
            Step("select", r, f"round {r + 1}: {chosen}", where.picks(r), partial(job.select, r)),
            Step("label", r, f"round {r + 1}: ask the teacher", where.summary(where.labels(r)), partial(job.label, r)),
            Step(
                "train", r + 1, f"round {r + 1}: train student {r + 1}", where.student(r + 1), partial(job.train, r + 1)
            ),
        ]
    if config.run.compare_plain:
        steps.append(
            Step("compare", None, "compare with the text alone", job.run.plain.student(rounds), job.train_plain)
        )
    if config.selection.compare_uniform:
        title = f"compare with {budget * rounds:,} uniformly chosen blocks"
        steps.append(Step("compare", None, title, job.run.comparison.student(1), job.compare))
    current = partial(are_current, job.run)
    return [
        *steps,
        Step("evaluate", None, "evaluate", where.metrics, partial(write_figures, job.run), current),
        Step(
            "report", None, "draw the report", where.report / "report.html", partial(write_token_report, where), current
        ),
    ]
