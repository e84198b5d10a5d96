"""The machine that the program at hand is traced for."""

import jax


def device() -> tuple[str, str]:
  """Platform ('cpu', 'gpu', 'tpu') and device kind, such as 'TPU v5 lite'.

  Those of the mesh around the call, which may be one that is only compiled for;
  without one, of the default device.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  found = jax.devices()[0] if abstract is None else abstract
  kind = found.device_kind
  if hasattr(found, 'platform'):
    return found.platform, kind
  # On JAX 0.7.2 a mesh knows its devices by their kind alone.
  return 'cpu' if kind == 'cpu' else 'tpu' if 'TPU' in kind else 'gpu', kind


def platform() -> str:
  return device()[0]
