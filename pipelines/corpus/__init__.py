"""From text and conversations to a pool of blocks of tokens for a language model.

Read in this order: ingesting (the entry point), settings, documents (what files hold), tokenising (text to ids and masks),
packing (ids to blocks), writing (blocks to the files of a pool).
Imports: ingest's sources, pool.
"""
