"""The report of a run: figures, tables, plots, one HTML file.

Read in this order: metrics, tables, plots, point_labels, html, cards, baseline.
Imports: jobs and below.
"""
