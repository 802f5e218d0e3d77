"""Holds configs, one get_config() a file; docstrings give the command, its cost and result."""
