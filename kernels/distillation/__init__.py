"""The distillation loss of logits: `interface.py` is the way in, `reference.py` the definition."""
