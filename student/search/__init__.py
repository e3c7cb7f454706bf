"""Searches over settings and sizes.

Read in this order: space, tuning, pareto.
Imports: nothing of student.
"""
