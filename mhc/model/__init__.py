"""The transformer around the connections."""
