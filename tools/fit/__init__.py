"""Fits the settings of methods to a model, on samples (`python -m tools.fit`)."""
