"""The operations in plain JAX."""
