"""Prediction: what a student says of files of examples, or of JSON lines as they come.

Read in this order: predict_files (the job), opened_model, huggingface, data_files, rows, values, output_folder, predict_lines,
serve_student.
Imports: ingest, pool, distilbeam.student, distilbeam.teacher.
"""
