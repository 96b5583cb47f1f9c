"""Calibration: sums that are gathered while texts pass through the model, and the statistics file.

`methods`, `budget` and `report` read the statistics.
"""
