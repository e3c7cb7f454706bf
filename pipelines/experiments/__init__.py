"""Experiments on a run's data: evaluation, exports, tuning, fronts of accuracy and size.

Read in this order: further_students, model_metrics, evaluate, exports, tune, pareto.
Imports: jobs and below, distilbeam.student.
"""
