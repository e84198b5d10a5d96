"""The comparison of residual designs, and its report from files."""
