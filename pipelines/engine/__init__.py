"""The phase: one linear Beam pipeline over items, each committed by a rename.

Read in this order: phase, failures, stopping, ending, then beam_options, counters, commit_queue, prefetch, watchdog, forkserver,
model_cache, display.
Imports: storage.
"""
