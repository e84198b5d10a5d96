"""The functions of `loss` on global arrays: the one `shard_map`."""

from collections.abc import Callable
import functools

import jax

from mhc.kernels import api
from mhc.parallel import pipelined
from mhc.parallel import replicated
from mhc.parallel.partition import BATCH, LAYERS, REPLICATED
from mhc.parallel.placement import Placement


def loss_and_grads(p: Placement) -> Callable:
  """(params, router_bias, tokens int32 [b, t + 1]) -> loss, gradient, loads."""
  return _shard_map(
    p, 'loss_and_grads', BATCH, (REPLICATED, p.param_specs, LAYERS)
  )


def token_losses(p: Placement) -> Callable:
  """(params, router_bias, tokens int32 [b, t + 1]) -> nats of each row [b]."""
  return _shard_map(p, 'token_losses', BATCH, BATCH)


def are_likeliest(p: Placement) -> Callable:
  """(params, router_bias, tokens int32 [b, t + 1]) -> 1 or 0 [b, t]."""
  return _shard_map(p, 'are_likeliest', BATCH, BATCH)


def stream_stats(p: Placement) -> Callable:
  """(params, router_bias, tokens int32 [b, t]) -> `StreamStats` twice."""
  return _shard_map(p, 'stream_stats', REPLICATED, (LAYERS, REPLICATED))


def _shard_map(p, name, tokens, out_specs):
  local = pipelined if p.is_pipelined else replicated
  return jax.shard_map(
    functools.partial(getattr(local, name), p),
    mesh=p.mesh,
    in_specs=(p.param_specs, p.router_bias_spec, tokens),
    out_specs=out_specs,
    check_vma=api.supports_vma(
      p.config.model.connection.implementation, p.mesh
    ),
  )
