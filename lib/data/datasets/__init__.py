"""TFDS builders of data sets that come with a Python package, so that nothing is downloaded."""
