"""Linear layers with 8-bit products: `interface.py` is the way in."""
