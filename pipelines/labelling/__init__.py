"""Labelling: rows become soft labels, shards are planned, labelled and committed.

Read in this order: shard_plan, phase, label_rows, label_quality, label_cache, reconcile, teacher_answers, pooled_labels,
pseudo_labels.
Imports: acquisition, pool, engine, distilbeam.teacher.
"""
