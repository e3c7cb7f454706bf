"""The phase: one linear Beam pipeline over items, each committed by a rename.

Read in this order: phase, failures; counters, commit_queue, prefetch, model_cache, malloc (inside a worker); beam_options, forkserver
with forkserver_client and forkserver_process, worker_ports (how workers start); watchdog, stopping, ending (how they end); display.
Imports: storage.
"""
