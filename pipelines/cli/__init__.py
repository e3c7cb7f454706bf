"""The command line: one file for each group of commands.

Read in this order: main (the entry, errors, the run's commands), options, label, stream, data, student, predict, serve, teacher, convert, launch,
workers, settings.
Imports: everything below; no other room imports it.
"""
