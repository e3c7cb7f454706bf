"""Evaluation: accuracy, likelihood, calibration, latency and size of a student.

Read in this order: metrics, paired, cross_validation, footprint.
Imports: data.
"""
