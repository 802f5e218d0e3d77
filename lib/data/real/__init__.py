"""Data that `python -m tools.real.fetch` fetches, read from its folder."""
