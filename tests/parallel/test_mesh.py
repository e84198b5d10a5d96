"""What the mesh changes of what is computed, and that a run says so."""

import dataclasses

from example_configs import TINY_RUN
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config
from mhc.config import dicts
from mhc.model import moe
from mhc.parallel import mesh as mesh_lib
from mhc.training import run

EXPERTS = config.MoEConfig(num_experts=4, expert_dim=8, num_shared=0)
WITH_EXPERTS = dicts.replace(
  TINY_RUN, model=dict(num_blocks=2, moe=dicts.to_dict(EXPERTS))
)


def line(mesh=(), rows=8, microbatch=0, **settings):
  changed = dicts.replace(
    WITH_EXPERTS,
    model=dict(moe=settings),
    mesh=dict(mesh),
    data=dict(batch_size=rows, microbatch_size=microbatch),
  )
  return mesh_lib.groups_line(
    changed, mesh_lib.make_mesh(changed.mesh, changed.data)
  )


def test_what_depends_on_the_mesh_says_on_how_many_rows():
  assert line() == line(router='none') == ''
  assert line(dispatch='capacity', num_experts=0) == ''
  on_two = line(router='sinkhorn', dispatch='capacity')
  assert on_two.startswith(
    "moe.dispatch='capacity' and moe.router='sinkhorn': 4 of the 8 rows"
  )
  assert ': 8 of' in line(dict(num_devices=1), router='sinkhorn')
  assert ': 2 of' in line(microbatch=2, router='sinkhorn')
  halves = dict(num_devices=2, num_sub_batches=2)
  assert ': 2 of' in line(halves, router='sinkhorn')
  pair = dict(num_devices=4, expert=2)
  assert ', by a capacity 4;' in line(pair, dispatch='capacity')
  own = line(pair, dispatch='capacity', transport='all_to_all')
  assert ': 2 of' in own
  assert 'by a capacity' not in own


@pytest.mark.parametrize(
  ('settings', 'is_same'),
  [
    ({}, True),
    ({'dispatch': 'capacity', 'capacity_factor': 1.0}, False),
    ({'router': 'sinkhorn'}, False),
  ],
)
def test_what_depends_on_the_rows_taken_together(settings, is_same):
  """Those that the line names, and no others."""
  layer = moe.MoE(
    dataclasses.replace(EXPERTS, **settings), 12, rngs=nnx.Rngs(0)
  )
  x = jax.random.normal(jax.random.key(1), (4, 16, 12))
  apply = jax.jit(lambda x: layer(x, jnp.zeros(4))[0])
  halves = jnp.concatenate([apply(x[:2]), apply(x[2:])])
  assert np.allclose(apply(x), halves, atol=1e-5) == is_same


def test_a_run_says_so_at_its_start(text, tmp_path, monkeypatch, capsys):
  class CompiledError(Exception):
    """The run has come to its compilation."""

  def compiled(*_, **__):
    raise CompiledError

  monkeypatch.setattr(run, '_compile', compiled)
  settings = dicts.replace(
    WITH_EXPERTS,
    data=dict(path=text),
    model=dict(moe=dict(dispatch='capacity')),
  )
  with pytest.raises(CompiledError):
    run.train(settings, tmp_path / 'run')
  said = capsys.readouterr()
  assert '2 of the 4 rows of a batch are taken together' in said.out + said.err
