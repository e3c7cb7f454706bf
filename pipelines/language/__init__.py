"""Runs of language models: blocks are chosen, labelled token by token, and learned, in rounds.

Read in this order: inputs, run, job, steps; figures, plots, report.
Imports: jobs, report and below; distilbeam.student.language.
"""
