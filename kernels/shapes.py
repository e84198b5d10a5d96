"""The sizes that the kernels are tested, measured and tuned at."""

# Widths C: the paper's 3B, 9B and 27B, and DeepSeek-V4's family.
PAPER = (1280, 1920, 2560)
WIDTHS = (*PAPER, 4096, 5120, 7168)
STREAMS = 4
TOKENS = 4096

# For tests, which interpret: (n, C, tokens); counts that fill no tile.
TINY = ((2, 128, 37), (3, 128, 20), (4, 256, 37), (8, 128, 20))
