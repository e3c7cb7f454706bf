"""The pool: which files and rows there are, in which pieces they are read, what identifies them.

Read in this order: pool_files, pool_types, splits, read_splits, row_reader, row_ranges, first_rows; datasets, labelled_sets,
reserved_names (a run's inputs); content_ids, content_digests; object_store.
Imports: engine, storage.
"""
