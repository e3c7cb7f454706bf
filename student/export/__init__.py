"""Exports: torch.export, ONNX, 8-bit and pruned students, and the runtimes that open them.

Read in this order: export, load, runtimes, quantise, prune.
Imports: training, evaluation, networks.
"""
