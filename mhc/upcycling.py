"""A trained plain model as the start of one with several residual streams."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from mhc import connections
from mhc import functional
from mhc import observation
from mhc import optimizer

# H_pre of mHC starts as sigmoid(3) at one stream and sigmoid(-3) at the others.
READ, OTHERS = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))
# Of the largest output: what rounding does to a network of many layers.
TOLERANCES = {4: 1e-4, 2: 5e-2}  # by bytes of its dtype
SHOWN = 5


def upcycle(
  plain: nnx.Module,
  wide: nnx.Module,
  *inputs,
  rename: Callable[[str], str] | None = None,
  tolerance: float | None = None,
  **keywords,
) -> float:
  """Copies a plain model into one with connections, and compares the two.

  Every variable of `plain` but the state of random numbers is copied to the one
  of the same name in `wide`, in place; the connections of `wide` keep what they
  start from. Then both are called.

  Args:
    plain: a model with a plain residual.
    wide: the same model with connections of `mhc` around its sub-layers.
    *inputs, **keywords: a batch, on which the two must agree. Without any
      nothing is compared.
    rename: from a variable's name in `plain`, as 'blocks.0.mlp.kernel', to its
      name in `wide`.
    tolerance: the difference that is accepted; 1e-4, for 16-bit outputs 5e-2.

  Returns:
    The largest difference of the outputs over the largest output; nan if
    nothing was compared.

  Raises:
    ValueError: names or shapes do not fit, and nothing is copied; or the
      outputs differ by more than `tolerance`, with what that comes from.
  """
  _copy(plain, wide, rename or (lambda name: name))
  if not inputs and not keywords:
    return math.nan
  want = _outputs(plain, inputs, keywords)
  got = _outputs(wide, inputs, keywords)
  difference = _difference(want, got)
  if tolerance is None:
    tolerance = TOLERANCES.get(min(each.dtype.itemsize for each in want), 1e-4)
  if not difference <= tolerance:
    raise ValueError(
      f'the wide model differs from the plain one by {difference:.2g} of the '
      f'largest output, more than the tolerance of {tolerance:g}: '
      + _reason(wide, inputs, keywords, want, got, tolerance)
    )
  return difference


def _copy(plain, wide, rename):
  source = {
    rename('.'.join(names)): leaf for names, leaf in _variables(plain).items()
  }
  target = {'.'.join(n): leaf for n, leaf in _variables(wide).items()}
  new = {'.'.join(n) for n in optimizer.in_connections(_state(wide))}
  if absent := [name for name in source if name not in target]:
    raise ValueError(
      f'the wide model has no {_some(absent)}: name its parts as those of the '
      'plain one, or give `rename`'
    )
  if unset := [n for n in target if n not in source and n not in new]:
    raise ValueError(
      f'the plain model has no {_some(unset)}, which are no parameters of a '
      'connection: name its parts as those of the wide one, or give `rename`'
    )
  for name, leaf in source.items():
    if leaf.shape != target[name].shape:
      raise ValueError(
        f'{name} has the shape {leaf.shape} in the plain model and '
        f'{target[name].shape} in the wide one: build both of the same sizes'
      )

  def taken(path, leaf):
    name = '.'.join(optimizer.path_names(path))
    return jnp.array(source[name], leaf.dtype) if name in source else leaf

  nnx.update(wide, jax.tree_util.tree_map_with_path(taken, _state(wide)))


def _state(model):
  return nnx.state(model, nnx.Not(nnx.RngState))


def _variables(model) -> dict[tuple[str, ...], jax.Array]:
  leaves = jax.tree_util.tree_leaves_with_path(_state(model))
  return {optimizer.path_names(path): leaf for path, leaf in leaves}


def _some(names):
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more


def _outputs(model, inputs, keywords) -> list[Any]:
  """The floating outputs of a model, NumPy."""
  leaves = jax.tree.leaves(model(*inputs, **keywords))
  floating = [
    leaf
    for leaf in leaves
    if hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  if not floating:
    raise ValueError('the model returns no floating array to compare')
  return [np.asarray(leaf) for leaf in floating]


def _difference(want, got):
  """The largest difference over the largest wanted output."""
  shapes = [[each.shape for each in model] for model in (want, got)]
  if shapes[0] != shapes[1]:
    raise ValueError(
      f'the plain model returns the shapes {shapes[0]}, the wide one '
      f'{shapes[1]}: close the streams once, with Collapse'
    )
  found = 0.0
  for a, b in zip(want, got, strict=True):
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = np.max(np.abs(a), initial=0) or 1.0
    found = max(found, float(np.max(np.abs(b - a), initial=0) / scale))
    if np.isnan(a).any() or np.isnan(b).any():
      return math.nan
  return found


def _reason(wide, inputs, keywords, want, got, tolerance):
  """Where the difference comes from, by further calls of the wide model."""
  if not all(np.isfinite(each).all() for each in (*want, *got)):
    return 'there are outputs that are not finite'
  a = np.concatenate([each.ravel() for each in want]).astype(np.float64)
  b = np.concatenate([each.ravel() for each in got]).astype(np.float64)
  factor = float(a @ b / (a @ a)) if a.any() else math.nan
  if abs(factor - 1) > tolerance and (
    np.max(np.abs(b - factor * a)) <= tolerance * np.max(np.abs(b))
  ):
    return (
      f'every output is {factor:.4g} times as large. Close the streams with '
      "Collapse('mean'), or with a norm behind it"
    )
  even = nnx.clone(wide)
  num_streams = _read_evenly(even)
  if num_streams and (
    _difference(want, _outputs(even, inputs, keywords)) <= tolerance
  ):
    seen = observation.observe(wide, *inputs, **keywords)
    square = float(np.min(seen.stats.rms)) ** 2
    scale = READ + (num_streams - 1) * OTHERS
    by_eps = 1e-6 / max(square, 1e-30) * (1 - scale**-2) / 2
    return (
      f'what sub-layers read is {scale:.4g} times the plain stream, and that '
      'is not undone. Put a norm directly behind `pre`, before anything else: '
      'a post-norm block is another function. If there is one, its eps must be '
      'small beside the mean square of what it reads, here at least '
      f'{square:.2g}: an eps of 1e-6 changes that token by {by_eps:.2g}'
    )
  return (
    'not because of what sub-layers read. Compare dropout, dtypes and what '
    'stands between the sub-layers'
  )


def _read_evenly(model) -> int:
  """Makes H_pre 1/n in every mHC connection; returns n, 0 if there is none."""
  found = 0
  for _, module in nnx.iter_graph(model):
    if isinstance(module, connections.MHC):
      n = found = module.shape[0]
      even = functional.uniform_read(n)
      module.bias[...] = module.bias[...].at[..., :n].set(even)
  return found
