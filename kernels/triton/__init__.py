"""The operations of kernels/reference.py as Triton kernels, for NVIDIA GPUs."""

import os

# Products and sums are contracted; Triton warns where this is not said.
os.environ.setdefault('TRITON_DEFAULT_FP_FUSION', '1')
