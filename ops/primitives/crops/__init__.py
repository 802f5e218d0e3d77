"""Pieces of methods for videos."""
