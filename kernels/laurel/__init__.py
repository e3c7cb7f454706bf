"""The learned augmented residual in one operation: `interface.py` is the way in, `reference.py` the definition."""
