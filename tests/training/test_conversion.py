"""Trained plain models as the start of others, which are taken apart again."""

import dataclasses

from example_configs import TINY_RUN
import folders
import huggingface_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved_runs

from mhc import config
from mhc.config import dicts
from mhc.interop import safetensors
from mhc.interop.huggingface import settings as hf_settings
from mhc.model import parameters
from mhc.runtime import files
from mhc.training import added
from mhc.training import checkpoint
from mhc.training import conversion
from mhc.training import run
from mhc.training import start
from mhc.training import step as step_lib


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder of Hugging Face on this machine: norms have an eps."""
  folder = tmp_path_factory.getbasetemp() / 'llama-here'
  reference.random_folder(folder, 'LlamaForCausalLM', num_hidden_layers=2)
  return folder


@pytest.fixture(scope='module')
def llama(here, tmp_path_factory):
  """The same, in a bucket if the tests are there."""
  folder = tmp_path_factory.mktemp('models') / 'llama'
  folders.copy(here, folder)
  return folder


@pytest.fixture(scope='module')
def initialised(here):
  """A model as transformers initialises it, on this machine, with tokens."""
  folder = here.with_name('initialised-here')
  reference.random_folder(
    folder, 'LlamaForCausalLM', std=0.02, num_hidden_layers=2
  )
  size = start.model_of(folder).vocab_size
  return folder, np.random.default_rng(1).integers(size, size=(2, 32))


@pytest.fixture(scope='module')
def error(here):
  """How far a model's logits are from those of the folder in float64."""
  size = start.model_of(here).vocab_size
  tokens = np.random.default_rng(0).integers(size, size=(2, 32))
  want = reference.logits(here, tokens)

  def of(source):
    got = conversion.logits(source, jnp.asarray(tokens, jnp.int32))
    return np.abs(got - want).max()

  return of


def nats(logits, tokens):
  """The mean loss of the next token."""
  given = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)
  return np.mean(np.log(np.exp(logits[:, :-1]).sum(-1)) - given[..., 0])


def with_kind(folder, kind, **changes):
  if kind in ('mhc', 'mhc_single_pass'):
    changes['sinkhorn_iters'] = 3
  connection = config.ConnectionConfig(kind, **changes)
  return dataclasses.replace(
    start.model_of(folder), connection=connection, recompute='none'
  )


EVERY = [
  (kind, n)
  for kind in config.KINDS
  for n in (2, 4, 8)
  if kind not in ('residual', 'attn_res_block', 'attn_res', 'mhar')
  and (kind, n) != ('mhc_lite', 8)
]
FEW = ('mhc', 8), ('hc', 2), ('cyclic', 4), ('mhc_single_pass', 4), ('frac', 4)


@pytest.mark.parametrize(
  ('kind', 'n'),
  [
    pytest.param(kind, n, marks=() if (kind, n) in FEW else pytest.mark.slow)
    for kind, n in EVERY
  ],
)
def test_they_start_as_the_same_function(kind, n, llama, error):
  """Up to rounding, though norms with an eps see how streams are read."""
  model = with_kind(llama, kind, num_streams=n)
  ours, difference = conversion.convert(llama, model)
  assert difference < 8e-6
  # As near to what float64 computes as the plain model is.
  assert 0 < error(ours) < 2.5 * error(start.read(llama))


@pytest.mark.parametrize(
  ('kind', 'n'),
  [
    pytest.param(kind, n, marks=() if (kind, n) == FEW[0] else pytest.mark.slow)
    for kind, n in EVERY
  ],
)
def test_logits_and_loss_of_an_initialised_model(kind, n, initialised):
  folder, tokens = initialised
  ours, _ = conversion.convert(folder, with_kind(folder, kind, num_streams=n))
  logits, plain = (
    np.float64(conversion.logits(source, jnp.asarray(tokens, jnp.int32)))
    for source in (ours, start.read(folder))
  )
  np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-6)
  np.testing.assert_allclose(
    nats(logits, tokens), nats(plain, tokens), rtol=0, atol=1e-7
  )


def test_kinds_that_start_as_another_function_say_so(llama):
  model = with_kind(llama, 'attn_res')
  message = r"kind='attn_res' would not start as .* differ by 0.0002.*--allow_d"
  with pytest.raises(ValueError, match=message):
    conversion.convert(llama, model)
  _, difference = conversion.convert(llama, model, allow_different=True)
  assert 1e-5 < difference < 1e-3


def test_a_value_residual_starts_as_nothing_and_has_no_class_of_theirs(llama):
  plain = start.model_of(llama)
  model = dicts.replace(plain, attention={'value_residual': True})
  source, difference = conversion.convert(llama, model)
  assert difference == 0
  gains = [names for part, names, _ in leaves(source.params) if part != 'base']
  assert gains == [('dense_blocks', 'attention', 'value_residual', 'gain')]
  with pytest.raises(ValueError, match='value_residual=True is in none of'):
    hf_settings.to_config(model, 64, None)
  kind = dataclasses.replace(model, connection=config.ConnectionConfig('mhc'))
  with pytest.raises(ValueError, match='value_residual=True is in none of'):
    hf_settings.to_config(kind, 64, None)


def settings(folder, text):
  model = dataclasses.replace(with_kind(folder, 'mhc'), adapter_rank=2)
  return config.Config(
    optimizer=config.OptimizerConfig(
      warmup_steps=1, trained='connections', connection_rate=3.0
    ),
    model=model,
    start_from=str(folder),
    num_steps=50,
    data=config.DataConfig(path=text, seq_len=8, batch_size=8),
    mesh=config.MeshConfig(num_devices=2),
    checkpoint_every=0,
    eval_sequences=8,
    final_sequences=8,
    probe_every=0,
  )


def leaves(params):
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    row = parameters.row(path)
    yield row.part, parameters.path_names(path), np.asarray(leaf)


def test_a_frozen_base_stays_and_what_was_added_is_saved_alone(
  here, llama, text, tmp_path, optax_promotion
):
  workdir, alone = tmp_path / 'run', tmp_path / 'alone'
  one = settings(llama, text)
  run.train(one, workdir, label=None)
  base = start.read(llama)
  trained = start.read(workdir)
  before = dict((names, leaf) for _, names, leaf in leaves(base.params))
  moved = {'connection': 0, 'adapter': 0}
  for part, names, leaf in leaves(trained.params):
    if part == 'base':
      np.testing.assert_array_equal(leaf, before[names], strict=True)
    else:
      fresh = 'phi' in names or 'adapter_out' in names  # these start as 0
      moved[part] += fresh and np.abs(leaf).max() > 0
  assert min(moved.values()) > 0

  assert added.export(workdir, alone) == one.num_steps
  assert added.is_folder(alone)
  again = added.attach(base, alone)
  jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
  size = files.size(alone / added.FILE)
  whole = files.size(llama / 'model.safetensors')
  assert size < 0.6 * whole  # of a tiny model; 0.02 of a large one
  with pytest.raises(ValueError, match='connections alone, which launch/conv'):
    start.read(alone)

  merged = conversion.merged(again)
  assert conversion.difference(merged, again) < 1e-4
  conversion.write(merged, alone, tmp_path / 'merged')
  _, params, _ = safetensors.load(tmp_path / 'merged')
  jax.tree.map(np.testing.assert_array_equal, params, merged.params)

  other = here.with_name('another-llama-here')
  reference.random_folder(
    other, 'LlamaForCausalLM', seed=1, num_hidden_layers=2
  )
  with pytest.raises(ValueError, match='was trained on other weights than'):
    added.attach(start.read(other), alone)


def test_a_run_starts_as_the_model_is_converted(llama, text, optax_promotion):
  """On two devices, to the last bit."""
  one = settings(llama, text)
  state = start.state(one, step_lib.build(one))
  want = start.convert(start.read(llama), one.model, one.seed)
  for got, leaf in zip(
    jax.tree.leaves(jax.device_get(state.params)),
    jax.tree.leaves(want.params),
    strict=True,
  ):
    np.testing.assert_allclose(got, leaf, rtol=1e-6)
  assert int(state.step) == 0


def test_its_own_kind_gives_all(tmp_path, optax_promotion):
  """A run's checkpoint, without its optimiser."""
  model = dataclasses.replace(
    TINY_RUN.model,
    num_blocks=2,
    moe=config.MoEConfig(num_experts=4, expert_dim=8, num_dense_blocks=0),
  )
  one, saved = saved_runs.save_run(tmp_path / 'run', model)
  other = dataclasses.replace(one, start_from=str(tmp_path / 'run'))
  start.check(other)
  state = start.state(other, step_lib.build(other))
  for name in ('params', 'router_bias'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(state, name), getattr(saved, name)
    )
  restored = checkpoint.restore_model(tmp_path / 'run')
  np.testing.assert_array_equal(restored.router_bias, state.router_bias)


def test_moments_come_along_where_asked_for(tmp_path, optax_promotion):
  """Of a plain run's parameters; those of new connections are 0."""
  model = dataclasses.replace(TINY_RUN.model, num_blocks=2)
  one, saved = saved_runs.save_run(tmp_path / 'run', model.plain)
  other = dataclasses.replace(
    one, model=model, start_from=str(tmp_path / 'run'), start_moments=True
  )
  start.check(other)
  state = start.state(other, step_lib.build(other))
  before = {
    parameters.path_names(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(saved.opt_state)
  }
  kept = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    names = parameters.path_names(path)
    np.testing.assert_array_equal(leaf, before.get(names, 0))
    kept += names in before
  assert kept == len(before)
  muon = dataclasses.replace(one.optimizer, name='muon')
  for changes, message in (
    ({'optimizer': muon}, "are of optimizer.name='adamw', this run has 'muon'"),
    ({'start_from': ''}, 'start_moments=True would not be used'),
  ):
    with pytest.raises(ValueError, match=message):
      start.check(dataclasses.replace(other, **changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dim': 64}, r'this model has model.dim=64, not 32'),
    ({'attention': {'num_kv_heads': 1}}, 'num_kv_heads=1, not 2'),
    ({'attention': {'rope_theta': 5e5}}, 'rope_theta=500000.0, not 10000.0'),
    ({'tied_embeddings': True}, 'tied_embeddings=True, not False'),
    (
      {'moe': {'num_experts': 4}},
      'num_experts=4, not 0',
    ),
  ],
)
def test_another_body_is_refused_before_any_work(changes, message, llama):
  model = dicts.replace(start.model_of(llama), **changes)
  with pytest.raises(ValueError, match=message):
    start.check(config.Config(model=model, start_from=str(llama)))


def test_other_connections_are_refused(tmp_path):
  hc = dicts.replace(config.ModelConfig(), connection={'kind': 'hc'})
  saved_runs.save_run(tmp_path / 'run', hc)
  for connection, message in (
    ({'kind': 'mhc'}, "kind='hc', this model 'mhc': it can start from its own"),
    (
      {'kind': 'hc', 'num_streams': 2},
      'connection.num_streams=4, this model 2',
    ),
  ):
    model = dicts.replace(config.ModelConfig(), connection=connection)
    with pytest.raises(ValueError, match=message):
      start.check(config.Config(model=model, start_from=str(tmp_path / 'run')))
  with pytest.raises(ValueError, match=r'nothing holds no model: no config.js'):
    start.check(config.Config(start_from=str(tmp_path / 'nothing')))
