"""A student's data: soft labels and labelled examples become batches of tensors.

Read in this order: loader, sampler, row_groups, shuffle, prefetch, columns, column_types, input_maker, batch_rng;
token_labels (blocks of tokens); labelled, class_labels; sentence_encoder; bad_rows, usable_rows (what cannot be learned from).
Imports: distilbeam.teacher.softlabels, distilbeam.inputs.
"""

from distilbeam.student.data.loader import SoftLabelDataset as SoftLabelDataset
from distilbeam.student.data.token_labels import TokenLabelDataset as TokenLabelDataset
