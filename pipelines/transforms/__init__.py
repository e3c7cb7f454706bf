"""PTransforms for pipelines of one's own; the streaming job is made of them.

Read in this order: label_examples, predict_examples, select_examples, combine_gains, write_soft_labels, beam_files, messages.
Imports: prediction, labelling, pool, engine.
"""
