"""A linear layer with 8-bit floating-point products: `interface.py` is the way in."""
