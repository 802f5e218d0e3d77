"""One get_config() a file; the docstring holds the command, its cost and what to expect."""
