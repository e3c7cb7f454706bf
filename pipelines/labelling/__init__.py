"""Labelling: rows become soft labels, shards are planned, labelled and committed.

Read in this order: shard_plan, shard_rows, phase, shard_work, label_rows, portions, label_quality. What was paid is
kept: saved_answers, in_flight, asking_apart, dead_letters, dead_letter_rows. A pool that grows: reconcile, contents, comparing,
questions, matching, copying, label_cache. A run's labels: teacher_answers, pooled_labels, pseudo_labels.
Imports: acquisition, pool, engine, distilbeam.teacher.
"""
