"""Making trained students smaller: `quantise.py` (int8 for ONNX exports) and `prune.py` (fewer channels)."""
