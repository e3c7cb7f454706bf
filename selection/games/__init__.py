"""The games of Robust Active Distillation: exact, with losses, with caps.

Read in this order: rad, capped.
Imports: sketch's levels, selection's checks and margins.
"""
