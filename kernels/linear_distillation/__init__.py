"""The student's last layer and the distillation loss in one: `interface.py` is the way in."""
