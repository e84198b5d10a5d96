"""`with x64():` computes in double precision, on any JAX of `make versions`."""

import jax
from jax import experimental

module = jax if hasattr(jax, 'enable_x64') else experimental
x64 = module.enable_x64
