"""Token labels from and to the prepared data sets of other trainers of language models.

Read in this order: importing (from them, the entry point), rows (what their files hold), distillkit (its compressed bytes), alignment (which
token a row describes), labels (a row's log-probabilities as labels), packing (rows into blocks); exporting (to them).
Imports: ingest's sources, corpus's blocks.
"""
