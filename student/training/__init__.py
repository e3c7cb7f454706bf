"""Training: batches, loss, augment, optimizer, state, checkpoints, processes.

Read in this order: train, config, batches, loss, augment, optimizer, state, checkpoints, distributed, blind, sample_weights, launch.
Imports: data, networks.
"""
