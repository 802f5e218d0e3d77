"""Scripts that run in the environment of another library; they import nothing of this project."""
