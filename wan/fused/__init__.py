"""The same results in fewer passes over memory, by Triton kernels and CUDA graphs."""
