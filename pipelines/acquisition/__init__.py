"""Acquisition: which rows are bought.

Read in this order: score (Beam), select (driver), herding.
Imports: pool, engine, distilbeam.selection.
"""
