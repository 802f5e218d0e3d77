"""Other libraries, run beside this one on the same weights and inputs."""
