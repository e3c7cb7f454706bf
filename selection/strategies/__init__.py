"""Acquisition strategies: what to buy, behind one interface.

Read in this order: selectors, herding, diverse, robust.
Imports: games.
"""
