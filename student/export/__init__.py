"""Exports: torch.export, ONNX, 8-bit and pruned students, and the runtimes that open them.

Read in this order: export, preprocessing, metadata, reader (a copy of which lies in every export), load, runtimes, quantise, prune.
Imports: training, evaluation, networks.
"""
