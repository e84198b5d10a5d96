"""The TPU kernels as functions with gradients; interpreted without a TPU.

What `reference` specifies; see there and in `dispatch` for the arguments. A
call that the kernels cannot serve raises NotImplementedError with the reason.
For the backward pass each operation keeps its operands, z and 1 / rms, and
nothing that it has made of the streams.
"""

import functools

import jax
import jax.numpy as jnp

from mhc import axes
from mhc import precision
from mhc.kernels import operands
from mhc.kernels import platform
from mhc.kernels.pallas import block_diagonal
from mhc.kernels.pallas import launch
from mhc.kernels.pallas import sinkhorn as sinkhorn_lib
from mhc.kernels.pallas import specs
from mhc.kernels.pallas import tiling


def sinkhorn(logits, num_iters, eps):
  interpret = platform.platform() != 'tpu'
  return sinkhorn_lib.sinkhorn(logits, num_iters, eps, interpret)


def pre(x, phi, alpha, bias, norm_eps):
  x, phi, gate = axes.together(x, phi, _gate(alpha, bias))
  sizes = _sizes(x, phi.shape[1], False, norm_eps)
  return operands.named_outputs(
    *_pre(jnp.moveaxis(x, 1, 0), phi, gate, sizes)[:2]
  )


def post(x, y, post, res):
  x, y, post, res = axes.together(x, y, post, _matrix(post, res))
  sizes = _sizes(x, 0, True)
  out = _post(jnp.moveaxis(x, 1, 0), y, post, res, sizes)
  return precision.mark('streams', jnp.moveaxis(out, 0, 1))


def advance(x, y, post, res, phi, alpha, bias, norm_eps):
  x, y, post, res, phi, gate = axes.together(
    x, y, post, _matrix(post, res), phi, _gate(alpha, bias)
  )
  sizes = _sizes(x, phi.shape[1], True, norm_eps)
  out, h, z = _advance(jnp.moveaxis(x, 1, 0), y, post, res, phi, gate, sizes)
  out = precision.mark('streams', jnp.moveaxis(out, 0, 1))
  return out, *operands.named_outputs(h, z)


def collapse(x, y, post, res):
  x, y, post, res = axes.together(x, y, post, _matrix(post, res))
  sizes = _sizes(x, 0, True)
  return _collapse(jnp.moveaxis(x, 1, 0), y, post, res, sizes)


def _gate(alpha, bias):
  return jnp.stack([jnp.broadcast_to(alpha, bias.shape), bias], axis=1)


def _matrix(post, res):
  """H_res as rows, [n n, t]; I where there is none."""
  return operands.res_or_identity(post, res).reshape(len(post) ** 2, -1)


def _sizes(x, k, writes, norm_eps=0.0):
  operands.check(x)
  _, n, dim = x.shape
  return tiling.Pass(n, dim, k, writes, x.dtype, norm_eps)


def _run(make, arrays, sizes):
  """Runs the call that `make` describes, with the largest tile that fits."""
  sizes, call = specs.largest(make, sizes, arrays['x'].shape[1])
  constants = specs.constants(sizes)
  arrays = {
    name: arrays[name] if name in arrays else jnp.asarray(constants[name])
    for name in call.inputs
  }
  return launch.run(call, arrays, sizes)


def _flat_phi(phi, sizes, order):
  """phi as the kernels take it, [p k, n d]: its parts in an order."""
  rows = block_diagonal.pad_rows(phi.T, sizes.height)
  if not sizes.is_bfloat16:
    return rows
  parts = block_diagonal.parts(rows, 3)
  return jnp.concatenate([parts[i] for i in order])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pre(x, phi, gate, sizes):
  arrays = {'x': x, 'phi': _flat_phi(phi, sizes, (0, 1, 2)), 'gate': gate}
  out = _run(specs.forward, arrays, sizes)
  return out['h'], out['z'], out['scale']


def _pre_forward(x, phi, gate, sizes):
  h, z, scale = _pre(x, phi, gate, sizes)
  return (h, z, scale), (x, phi, gate, z, scale)


def _pre_backward(sizes, kept, cotangents):
  x, phi, gate, z, scale = kept
  dh, dz, _ = cotangents
  arrays = {'x': x, 'dh': dh, 'dz': dz, 'z': z, 'scale': scale, 'gate': gate}
  arrays['phi'] = _flat_phi(phi, sizes, (0, 1, 0))
  out = _run(specs.backward, arrays, sizes)
  return out['dx'], *_read_gradients(out, z, sizes)


_pre.defvjp(_pre_forward, _pre_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _post(x, y, post, res, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res}
  return _run(specs.forward, arrays, sizes)['x_next']


def _post_forward(x, y, post, res, sizes):
  return _post(x, y, post, res, sizes), (x, y, post, res)


def _post_backward(sizes, kept, dx_next):
  arrays = dict(zip(('x', 'y', 'post', 'res'), kept, strict=True))
  arrays['dx_next'] = dx_next
  out = _run(specs.backward, arrays, sizes)
  return out['dx'], out['dy'], *_write_gradients(out, sizes)


_post.defvjp(_post_forward, _post_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _advance(x, y, post, res, phi, gate, sizes):
  return _advance_forward(x, y, post, res, phi, gate, sizes)[0]


def _advance_forward(x, y, post, res, phi, gate, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res, 'gate': gate}
  arrays['phi'] = _flat_phi(phi, sizes, (0, 1, 2))
  out = _run(specs.forward, arrays, sizes)
  kept = (x, y, post, res, phi, gate, out['z'], out['scale'])
  return (out['x_next'], out['h'], out['z']), kept


def _advance_backward(sizes, kept, cotangents):
  x, y, post, res, phi, gate, z, scale = kept
  dx_next, dh, dz = cotangents
  arrays = {'x': x, 'y': y, 'post': post, 'res': res, 'gate': gate}
  arrays |= {'dx_next': dx_next, 'dh': dh, 'dz': dz, 'z': z, 'scale': scale}
  arrays['phi'] = _flat_phi(phi, sizes, (0, 1, 0))
  out = _run(specs.backward, arrays, sizes)
  return (
    out['dx'],
    out['dy'],
    *_write_gradients(out, sizes),
    *_read_gradients(out, z, sizes),
  )


_advance.defvjp(_advance_forward, _advance_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _collapse(x, y, post, res, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res}
  return _run(specs.collapse, arrays, sizes)['h']


def _collapse_forward(x, y, post, res, sizes):
  return _collapse(x, y, post, res, sizes), (x, y, post, res)


def _collapse_backward(sizes, kept, dh):
  """Every stream has the gradient of the sum: so has every row of H_res."""
  arrays = dict(zip(('x', 'y', 'post', 'res'), kept, strict=True))
  arrays['dh'] = dh
  out = _run(specs.collapse_backward, arrays, sizes)
  of_streams, of_output = out['u'][: sizes.n], out['u'][sizes.n :]
  return (
    out['dx'],
    out['dy'],
    jnp.broadcast_to(of_output, (sizes.n, dh.shape[0])),
    jnp.tile(of_streams, (sizes.n, 1)),
  )


_collapse.defvjp(_collapse_forward, _collapse_backward)


def _read_gradients(out, z, sizes):
  """Of phi and of the gate."""
  d_logits = out['d_logits']
  d_alpha = jnp.sum(d_logits * z[: sizes.n], axis=1)
  gate = jnp.stack([d_alpha, jnp.sum(d_logits, axis=1)], axis=1)
  return out['dphi'][: sizes.k].T, gate


def _write_gradients(out, sizes):
  """Of post, [n, t], and of res, [n n, t]."""
  n = sizes.n
  d_mix = out['d_mix']
  return d_mix[:, n], d_mix[:, :n].reshape(n * n, -1)
