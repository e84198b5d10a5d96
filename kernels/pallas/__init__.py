"""TPU kernels of the operations; interpreted on other machines."""
