"""Acquisition: which rows are bought.

Read in this order: score (Beam; score_blocks for language models;
usable_answers and unusable_rows for rows that a student cannot read), or find_unusable (Beam)
before a choice that looks at no row; select (driver), in_memory (strategies that compare rows); encode_texts (Beam;
what a sentence encoder says of rows).
Imports: pool, engine, distilbeam.selection, distilbeam.student.
"""
