"""Pipeline schedules: as tables without JAX, and what runs them."""
