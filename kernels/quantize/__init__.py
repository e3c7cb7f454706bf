"""Rows of numbers in 8 bits with one scale each: `interface.py` is the way in, `reference.py` the definition."""
