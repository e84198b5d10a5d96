"""The paper's printed counts, and the ladder's rungs."""

import dataclasses

from flax import nnx
import jax
import pytest

from mhc import config
from mhc.config import presets
from mhc.model import transformer
from mhc.parallel import counts


@pytest.mark.parametrize(
  ('size', 'total', 'active', 'connections'),
  [
    ('3b', '2.97B', '612M', '2.95M'),
    ('9b', '9.18B', '1.66B', '6.64M'),
    ('27b', '27.0B', '4.14B', '14.75M'),
    ('3b_1t', '2.97B', '612M', '2.95M'),
  ],
)
def test_the_papers_counts_to_the_last_digit(size, total, active, connections):
  got = counts.count(presets.paper(size).model, 4096)

  def printed(value, like):
    digits = len(like[:-1].partition('.')[2])
    return f'{value / {"M": 1e6, "B": 1e9}[like[-1]]:.{digits}f}{like[-1]}'

  assert printed(got['total_params'], total) == total
  assert printed(got['active_params'], active) == active
  assert printed(got['connection_params'], connections) == connections


@pytest.mark.parametrize(
  ('size', 'tokens'),
  [('3b', 39.32e9), ('9b', 104.86e9), ('27b', 262.1e9), ('3b_1t', 1048.6e9)],
)
def test_the_papers_training_tokens(size, tokens):
  run = presets.paper(size)
  assert abs(run.num_steps * run.tokens_per_step / tokens - 1) < 1e-3


@pytest.mark.parametrize('size', ['1m', '3m', '10m', '30m', '100m'])
def test_rungs_have_the_active_parameters_of_their_name(size):
  got = counts.count(presets.ladder(size).model, 64)
  want = int(size[:-1]) * 1e6
  assert 0.9 * want < got['active_params'] < 1.2 * want


def test_counts_are_those_of_a_real_model():
  for kind in config.KINDS:
    settings = dataclasses.replace(
      presets.ladder('1m', kind).model, num_blocks=2, dim=16
    )
    model = nnx.eval_shape(
      lambda settings=settings: transformer.Transformer(
        settings, rngs=nnx.Rngs(0)
      )
    )
    got = counts.count(settings, 64)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(model))
    sizes = [leaf.size for path, leaf in leaves if 'place' not in str(path)]
    assert got['total_params'] == sum(sizes)
    assert (got['connection_params'] == 0) == (kind == 'residual')


def test_flops_of_a_dense_model_by_hand():
  settings = config.ModelConfig(
    num_blocks=2, connection=config.ConnectionConfig(kind='residual')
  )
  got = counts.count(settings, 100)
  attention = 2 * (2 * 2 * (2 * 32 + 16)) * 50
  assert got['flops_per_token'] == 6 * got['active_params'] + 3 * attention
  assert got['active_params'] == got['total_params'] - 320 * 64


def test_unknown_sizes_are_named():
  with pytest.raises(ValueError, match=r"'7b'.*'3b', '9b', '27b'"):
    presets.paper('7b')
  with pytest.raises(ValueError, match=r"'2m'.*'1m', '3m'"):
    presets.ladder('2m')
