"""Acquisition strategies: what to buy, behind one interface.

Read in this order: registry (their names), selectors (the base class and the plain ones), facility_location, herding,
diverse, robust.
Imports: games.
"""
