"""From CSV, JSON lines, TFRecord, text lines and folders of images to a pool of Parquet files.

`ingesting.ingest` is the entry point. Text goes through DuckDB: `csv_table` (from `csv_files`) and `lines_table` (from
`lines`) load records as text, `text_types` (with `vectors` and `columns`) finds what the columns are, `typed_text` converts.
TFRecord files and images go through the phases of `parsed_records` (`index`, `parse`). `duplicates`, `letters` and `write`
end both ways.
"""
