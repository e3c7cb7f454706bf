"""The phase: one linear Beam pipeline over items, each committed by a rename.

Read in this order: phase, submission, failures; item_fn, counters, commit_queue, prefetch, model_cache, malloc (inside a worker);
beam_options, prism, forkserver with forkserver_client and forkserver_process, worker_pool, worker_ports (how engines and workers
start); watchdog, stopping, ending, engine_lines (how they end, and where what they say goes); display.
Imports: storage.
"""
