"""The pool: which files and rows there are, in which pieces they are read, what identifies them.

Read in this order: splits, row_reader, datasets, content_ids, object_store.
Imports: engine, storage.
"""
