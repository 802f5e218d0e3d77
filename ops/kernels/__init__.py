"""Kernels of attention for GPUs and TPUs, and what calls the shipped ones."""
