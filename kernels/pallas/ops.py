"""The TPU kernels as functions with gradients; interpreted without a TPU.

`reference` specifies them; see there and in `api` for the arguments. A call
that the kernels cannot serve raises NotImplementedError with the reason. For
the backward pass each operation keeps its operands, z and 1 / rms, and nothing
that it has made of the streams.

The kernels take streams as [n, t, d], H_res as [n n, t], and alpha and bias of
H_pre side by side as the `gate`, [n, 2].
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

# The order in which the bfloat16 parts of phi meet those of what it multiplies.
FORWARD_PARTS = (0, 1, 2)
BACKWARD_PARTS = (0, 1, 0)


def sinkhorn(logits, num_iters, eps):
  n, _, num_tokens = logits.shape
  if n > sinkhorn_lib.LARGEST:
    raise NotImplementedError(
      f'{n} x {n} matrices: at most {sinkhorn_lib.LARGEST} x '
      f'{sinkhorn_lib.LARGEST}'
    )
  if not num_tokens:
    raise NotImplementedError('no matrices')
  interpret = platform.platform() != 'tpu'
  return sinkhorn_lib.sinkhorn(logits, num_iters, eps, interpret)


# pre


def pre(x, phi, alpha, bias, norm_eps):
  x, phi, gate = axes.unify_varying(x, phi, _gate(alpha, bias))
  sizes = _sizes(x, phi.shape[1], False, norm_eps)
  h, z = _pre(jnp.moveaxis(x, 1, 0), phi, gate, sizes)
  return operands.named_outputs(h, z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pre(x, phi, gate, sizes):
  return _pre_forward(x, phi, gate, sizes)[0]


def _pre_forward(x, phi, gate, sizes):
  arrays = {'x': x, 'gate': gate, 'phi': _flat_phi(phi, sizes, FORWARD_PARTS)}
  out = launch.run(specs.forward, sizes, arrays)
  return (out['h'], out['z']), (x, phi, gate, out['z'], out['scale'])


def _pre_backward(sizes, kept, cotangents):
  x, phi, gate, z, scale = kept
  dh, dz = cotangents
  arrays = {'x': x, 'dh': dh, 'dz': dz, 'z': z, 'scale': scale, 'gate': gate}
  arrays['phi'] = _flat_phi(phi, sizes, BACKWARD_PARTS)
  out = launch.run(specs.backward, sizes, arrays)
  return out['dx'], *_read_gradients(out, z, sizes)


_pre.defvjp(_pre_forward, _pre_backward)


# post


def post(x, y, post, res):
  x, y, post, res = axes.unify_varying(x, y, post, _flat_res(post, res))
  sizes = _sizes(x, 0, True)
  out = _post(jnp.moveaxis(x, 1, 0), y, post, res, sizes)
  return precision.mark('streams', jnp.moveaxis(out, 0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _post(x, y, post, res, sizes):
  return _post_forward(x, y, post, res, sizes)[0]


def _post_forward(x, y, post, res, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res}
  out = launch.run(specs.forward, sizes, arrays)
  return out['x_next'], arrays


def _post_backward(sizes, kept, dx_next):
  out = launch.run(specs.backward, sizes, {**kept, 'dx_next': dx_next})
  return out['dx'], out['dy'], *_write_gradients(out, sizes)


_post.defvjp(_post_forward, _post_backward)


# advance


def advance(x, y, post, res, phi, alpha, bias, norm_eps):
  x, y, post, res, phi, gate = axes.unify_varying(
    x, y, post, _flat_res(post, res), phi, _gate(alpha, bias)
  )
  sizes = _sizes(x, phi.shape[1], True, norm_eps)
  out, h, z = _advance(jnp.moveaxis(x, 1, 0), y, post, res, phi, gate, sizes)
  out = precision.mark('streams', jnp.moveaxis(out, 0, 1))
  return out, *operands.named_outputs(h, z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _advance(x, y, post, res, phi, gate, sizes):
  return _advance_forward(x, y, post, res, phi, gate, sizes)[0]


def _advance_forward(x, y, post, res, phi, gate, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res, 'gate': gate}
  arrays['phi'] = _flat_phi(phi, sizes, FORWARD_PARTS)
  out = launch.run(specs.forward, sizes, arrays)
  kept = (x, y, post, res, phi, gate, out['z'], out['scale'])
  return (out['x_next'], out['h'], out['z']), kept


def _advance_backward(sizes, kept, cotangents):
  x, y, post, res, phi, gate, z, scale = kept
  dx_next, dh, dz = cotangents
  arrays = {'x': x, 'y': y, 'post': post, 'res': res, 'gate': gate}
  arrays |= {'dx_next': dx_next, 'dh': dh, 'dz': dz, 'z': z, 'scale': scale}
  arrays['phi'] = _flat_phi(phi, sizes, BACKWARD_PARTS)
  out = launch.run(specs.backward, sizes, arrays)
  return (
    out['dx'],
    out['dy'],
    *_write_gradients(out, sizes),
    *_read_gradients(out, z, sizes),
  )


_advance.defvjp(_advance_forward, _advance_backward)


# collapse


def collapse(x, y, post, res):
  x, y, post, res = axes.unify_varying(x, y, post, _flat_res(post, res))
  sizes = _sizes(x, 0, True)
  return _collapse(jnp.moveaxis(x, 1, 0), y, post, res, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _collapse(x, y, post, res, sizes):
  return _collapse_forward(x, y, post, res, sizes)[0]


def _collapse_forward(x, y, post, res, sizes):
  arrays = {'x': x, 'y': y, 'post': post, 'res': res}
  out = launch.run(specs.collapse, sizes, arrays)
  return out['h'], arrays


def _collapse_backward(sizes, kept, dh):
  """Every stream has the gradient of the sum: so has every row of H_res."""
  out = launch.run(specs.collapse_backward, sizes, {**kept, 'dh': dh})
  of_streams, of_output = out['u'][: sizes.n], out['u'][sizes.n :]
  return (
    out['dx'],
    out['dy'],
    jnp.broadcast_to(of_output, (sizes.n, dh.shape[0])),
    jnp.tile(of_streams, (sizes.n, 1)),
  )


_collapse.defvjp(_collapse_forward, _collapse_backward)


# Operands and gradients that the operations share.


def _sizes(x, k, writes, norm_eps=0.0):
  operands.check(x)
  _, n, dim = x.shape
  _, chip = launch.machine()
  return specs.make_sizes(
    n, dim, k, writes, x.dtype, norm_eps, chip.matrix_unit
  )


def _gate(alpha, bias):
  return jnp.stack([jnp.broadcast_to(alpha, bias.shape), bias], axis=1)


def _flat_res(post, res):
  """Returns H_res as rows, [n n, t]."""
  return operands.res_or_identity(post, res).reshape(len(post) ** 2, -1)


def _flat_phi(phi, sizes, order):
  """Returns phi as the kernels take it, [p k, n d]: its parts in an order."""
  rows = block_diagonal.pad_rows(phi.T, sizes.padded_rows)
  if not sizes.is_bfloat16:
    return rows
  parts = block_diagonal.split_bf16(rows, 3)
  return jnp.concatenate([parts[i] for i in order])


def _read_gradients(out, z, sizes):
  """Returns the gradients of phi and of the gate."""
  d_logits = out['d_logits']
  d_alpha = jnp.sum(d_logits * z[: sizes.n], axis=1)
  gate = jnp.stack([d_alpha, jnp.sum(d_logits, axis=1)], axis=1)
  return out['dphi'][: sizes.k].T, gate


def _write_gradients(out, sizes):
  """Returns the gradients of post, [n, t], and of res, [n n, t]."""
  n = sizes.n
  d_mix = out['d_mix']
  return d_mix[:, n], d_mix[:, :n].reshape(n * n, -1)
