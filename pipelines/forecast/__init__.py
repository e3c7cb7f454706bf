"""Forecasts: what is left of a job and what it will cost.

Read in this order: forecast, token_forecast, rates.
Imports: jobs and below.
"""
