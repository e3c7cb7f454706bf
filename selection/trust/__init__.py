"""How far to trust a teacher: accuracy, temperature, debiasing weights, local errors, pooled beliefs.

Read in this order: noise, calibration, class_order, debias, local_errors, pooling; ties is what they share.
Imports: selection's checks and margins.
"""
