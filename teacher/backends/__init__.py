"""Teachers, a file for each kind.

Read in this order: local (what those in this process share), torch, onnx, huggingface, savedmodel, beam.
Imports: teacher's protocol, config and fingerprint.
"""
