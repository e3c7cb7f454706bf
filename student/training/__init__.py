"""Training: batches, loss, augment, optimizer, state, checkpoints, processes.

Read in this order: train, config, batches, loss, augment, wrap, optimizer, taken, single_rows, threads; state, rng, checkpoints, fingerprint,
metrics_log, trackers (what is kept); distributed, torchrun_folders (several processes); blind, sample_weights, launch, launch_plan.
Imports: data, networks.
"""
