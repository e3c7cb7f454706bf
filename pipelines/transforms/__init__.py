"""PTransforms for pipelines of one's own, and the streaming job that is made of them.

Read in this order: label_examples, select_examples, combine_gains, write_soft_labels, beam_files, messages, stream_job.
Imports: labelling, pool, engine.
"""
