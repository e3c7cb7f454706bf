"""The folders that `distilbeam init DIR --example NAME` writes: data that is embedded or generated, a teacher, a configuration.

Read in this order: registry (their names and the commands that come next), digits, text, images, nightly, streaming;
teachers (training and exporting the networks that they ask).
Imports: engine, distilbeam.teacher.
"""
