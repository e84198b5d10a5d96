"""`with x64():` computes in double precision, on any JAX of `make versions`."""

import jax
from jax import experimental

x64 = getattr(jax, 'enable_x64', None) or experimental.enable_x64
