"""Head-to-head studies of the methods that distilbeam implements: which labels to buy, and how to learn from them.

One command per study (`python -m benchmarks.science.study1 --help`), all over the same harness:

| module | what it has |
|---|---|
| problems, clinc, digits, cifar, synthetic | datasets with their teachers, one seed at a time |
| training | a student trained in memory by the product's own step, optimizer and schedule |
| buying | rounds of choosing, asking the teacher and training |
| losses | what a student learns from the labels that were bought |
| cells | results on disk, one file per cell, so that a stopped study goes on |
| study1, study2, study3, study4, study5, study6, study7, study8 | the studies |
| report1, report2, report_short, comparing, keeping | what their reports are made of |
| statistics, report | intervals, the rule for "not worse", tables, plots |
"""
