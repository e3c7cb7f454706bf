"""Acquisition: which rows are bought.

Read in this order: score (Beam), or find_unusable (Beam) before a uniform choice; select (driver), herding.
Imports: pool, engine, distilbeam.selection.
"""
