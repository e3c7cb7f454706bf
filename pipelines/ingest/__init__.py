"""From CSV, JSON lines, TFRecord, text lines and folders of images to a pool of Parquet files.

`ingesting.ingest` is the entry point. It is a chain of phases like every job here (see `phases`):

index (files -> blocks that can be read on their own), survey (what the values of each column are; the driver merges them
into one schema), parse (records -> typed Arrow rows with the hash of their content; bad records -> dead letters),
compare (rows with equal hashes, per range of hashes), write (what is left -> Parquet).
"""
