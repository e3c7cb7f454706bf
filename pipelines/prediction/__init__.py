"""Prediction: what a student says of files of examples, or of JSON lines as they come.

Read in this order: predict_files (the job), opened_model, data_files, rows, values, output_folder, predict_lines.
Imports: ingest, pool, distilbeam.student.
"""
