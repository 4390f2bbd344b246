"""Triton kernels and CUDA graphs: results of the plain networks in fewer passes over memory."""
