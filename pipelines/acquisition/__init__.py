"""Acquisition: which rows are bought.

Read in this order: score (Beam; usable_answers and unusable_rows for rows that a student cannot read), select (driver),
in_memory (strategies that compare rows).
Imports: pool, engine, distilbeam.selection.
"""
