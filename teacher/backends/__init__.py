"""Teachers, a file for each kind.

Read in this order: local (what those in this process share; repeating), torch, onnx (onnx_files), huggingface, savedmodel
(saved_operations), beam.
Imports: teacher's protocol, config and fingerprint.
"""
