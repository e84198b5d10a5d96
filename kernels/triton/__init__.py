"""The operations of kernels/reference.py as Triton kernels, for NVIDIA GPUs."""
