"""Experiments on a run's data: evaluation, exports, tuning, fronts of accuracy and size.

Read in this order: run_data, evaluate, model_metrics, exports, tune, pareto.
Imports: jobs and below, distilbeam.student.
"""
