"""The operations without gradients of their own."""
