"""Losses as pure functions: they return unreduced items, `training/step.py` divides."""
