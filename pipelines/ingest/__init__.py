"""From CSV, JSON lines, TFRecord, text lines and folders of images to a pool of Parquet files.

`ingesting.ingest` is the entry point, `settings` what it is told, `sources` the files that it finds. Text goes through DuckDB:
`csv_table` (from `csv_files`) and `lines_table` (from `lines`) load records as text, `text_types` (with `vectors` and `columns`)
finds what the columns are, `typed_text` converts; `database` is the DuckDB of one ingest, `records` and `records_table` are what it
holds, `pool_columns` what comes out. TFRecord files and images go through the phases of `parsed_records` (`index`, `parse`,
`committing`; their formats in `tfrecord` and `binary_records`, their values in `conversion`).
`duplicates`, `letters` and `write`
end both ways.
"""
