"""A whole student's linear layers brought to 8 bits: `interface.py` is the way in."""
