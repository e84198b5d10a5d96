"""XLA options that overlap communication with computation on TPUs.

By default a TPU program waits for every collective but `ppermute`. Each option
here was seen to make one kind asynchronous, with matrix products scheduled
between its start and its end, in programs compiled by libtpu 0.0.48; none of
them has run on a TPU here, which is why `mesh.overlap` can turn them off.

On v5p and v6e collectives go to the SparseCores; tpu7x does that by itself for
all but all_to_all. The gathers of matrices split over `data`, in a loop over
blocks, are moved one block ahead, forward and backward, by those of `AHEAD`.
They move every gather of the loop, and compute what it waits for twice: where
tokens are gathered too, all of attention (27B on v6e:16x16, in one program
4.07 s a step, in the other 3.10).
"""

SPARSE_CORE = 'xla_tpu_enable_sparse_core_collective_offload_'
AHEAD = {
  'xla_tpu_enable_ici_ag_pipelining': True,
  'xla_should_allow_loop_variant_parameter_in_chain': 'ENABLED',
  'xla_should_add_loop_invariant_op_in_chain': 'ENABLED',
}
OPTIONS = {
  'v5e': {
    'xla_tpu_enable_async_all_to_all': True,
    'xla_tpu_enable_async_ragged_all_to_all': True,
  },
  'v5p': {
    f'{SPARSE_CORE}{kind}': True
    for kind in (
      'all_gather',
      '2d_all_gather',
      'reduce_scatter',
      'all_reduce',
      'dense_all_to_all',
      'ragged_all_to_all',
    )
  },
  'tpu7x': {f'{SPARSE_CORE}dense_all_to_all': True},
}
OPTIONS['v6e'] = OPTIONS['v5p'] | {f'{SPARSE_CORE}nd_reduce_scatter': True}


def options(generation: str, ahead: bool) -> dict[str, bool | str]:
  """Returns the options for a generation of `chips.CHIPS`.

  `ahead` is for programs whose loops gather matrices, and nothing else.
  """
  if generation == 'v5e' or not ahead:
    return dict(OPTIONS.get(generation, {}))
  return OPTIONS.get(generation, {}) | AHEAD
