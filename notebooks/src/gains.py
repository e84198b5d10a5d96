# %% [markdown]
# # Gains over depth: HC and mHC
#
# A network with several residual streams multiplies one mixing matrix per
# sub-layer. The gain of the product says how far a signal, or a gradient, can
# grow on its way. This notebook measures gains of random matrices, with the
# library alone, and then of two small models that it trains in a minute.

# %% install mhc-jax matplotlib

# %%
from mhc.runtime import machine

machine.skip_search()
print(machine.describe())

# %% [markdown]
# ## What a gain is
#
# The paper's Amax gain of a matrix $M$ is $\max_i |\sum_j M_{ij}|$ forward (row
# sums: what the streams grow by) and $\max_j |\sum_i M_{ij}|$ backward (column
# sums: what their gradients grow by). Both are 1 for every doubly stochastic
# matrix. `mhc.gains.composites` multiplies over depth, in both directions.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mhc

mixing = jnp.array([[0.9, 0.3], [0.2, 1.0]])
forward, backward = mhc.gains.amax_gain(mixing)
print(f'forward {forward:.2f}, backward {backward:.2f}')

# %% [markdown]
# ## Random mappings
#
# Three ways to mix four streams near the identity: freely (HC), by doubly
# stochastic matrices (mHC), and by rotations (the Cayley transform of JPmHC),
# which keep norms instead of sums. Bands hold nine of ten of 256 tokens.

# %%
DEPTH, TOKENS, N = 96, 256, 4


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnums=0)
def from_logits(mixing, logits):
  """H_res [depth, tokens, n, n] of logits [depth, tokens, k]."""
  flat = logits.reshape(-1, logits.shape[-1]).T
  matrices = mhc.mixing.matrices(mixing, flat, N)
  return jnp.moveaxis(matrices, -1, 0).reshape(DEPTH, TOKENS, N, N)


start = mhc.mixing.initial_logits('sinkhorn', N)
designs = {
  'HC': jnp.eye(N) + 0.1 * normal(0, DEPTH, TOKENS, N, N),
  'mHC': from_logits('sinkhorn', start + normal(0, DEPTH, TOKENS, N * N)),
  'rotations': from_logits('cayley', 0.1 * normal(0, DEPTH, TOKENS, 6)),
}
COLORS = {'HC': '#D55E00', 'mHC': '#0072B2', 'rotations': '#882255'}

# %%
depth = np.arange(1, DEPTH + 1)
figure, axes = plt.subplots(
  1, 2, figsize=(9, 3.4), sharey=True, layout='constrained'
)
for name, matrices in designs.items():
  upto, beyond = jax.jit(mhc.gains.composites)(matrices)
  gains = mhc.gains.amax_gain(upto)[0], mhc.gains.amax_gain(beyond)[1]
  for axis, gain in zip(axes, gains, strict=True):
    low, middle, high = np.quantile(gain, (0.05, 0.5, 0.95), axis=1)
    axis.plot(depth, middle, color=COLORS[name], label=name)
    axis.fill_between(depth, low, high, color=COLORS[name], alpha=0.15)
axes[0].set(title='forward, 1 to l', xlabel='sub-layer l', ylabel='gain')
axes[1].set(title='backward, l to L', xlabel='sub-layer l', yscale='log')
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## What mHC pays
#
# A doubly stochastic matrix keeps the mean of the streams and shrinks what they
# differ by. The largest singular value on the differences says how much is
# left. mHC starts at $(e^6 - 1) / (e^6 + 3) = 0.990$ per sub-layer, which
# halves a difference in 70 sub-layers; logits that have moved away from the
# start by N(0, 1) halve it sooner.

# %%
still = jnp.broadcast_to(start, (DEPTH, TOKENS, N * N))
cases = {'mHC at its start': from_logits('sinkhorn', still)}
cases |= {'mHC + N(0, 1)': designs['mHC'], 'rotations': designs['rotations']}
figure, axis = plt.subplots(figsize=(6, 3.4), layout='constrained')
for name, matrices in cases.items():
  kept = jax.jit(mhc.gains.profile)(matrices)['sigma_diff_fwd']
  life = mhc.gains.half_life(kept)
  label = f'{name}: halves in {life:.0f} sub-layers'
  if not life < 1e4:
    label = f'{name}: keep all'
  axis.plot(depth, kept, label=label)
axis.set(xlabel='sub-layers', ylabel='of a difference is left', ylim=(0, 1.05))
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Trained models
#
# From here on the notebook trains, which needs more than the library. In Colab
# this cell replaces JAX and starts Python again; run all cells once more then.

# %% install mhc-jax[train]

# %% [markdown]
# Two transformers of 8 blocks, 16 sub-layers, learn the source code of
# Python's standard library for 20 steps at a high learning rate. They differ in
# their connection alone. `run.train` is what `launch/train.py` calls; it leaves
# all that was measured in the run's folder. A run that is stopped goes on where
# it was when the cell runs again.

# %%
import dataclasses
import pathlib
import tempfile

from mhc import config
from mhc.experiments import plots
from mhc.experiments import results
from mhc.training import run

folder = pathlib.Path(tempfile.gettempdir()) / 'mhc_gains'
base = config.Config(
  num_steps=20,
  model=config.ModelConfig(num_blocks=8, dim=32, ffn_dim=64, recompute='none'),
  data=config.DataConfig(seq_len=32, batch_size=4),
  optimizer=config.OptimizerConfig(
    learning_rate=5e-2, warmup_steps=5, schedule='constant', clip_norm=0.0
  ),
  # The guards say when a gain passes 10; here it may.
  guards=config.GuardsConfig(
    gain_bound=1e30, growth_bound=1e30, cosine_bound=1.0
  ),
  mesh=config.MeshConfig(num_devices=1),
  eval_every=0,
  eval_sequences=32,
  final_sequences=32,
  probe_every=4,
  probe_sequences=4,
)

# %%
trained = {}
for kind in ('hc', 'mhc'):
  connection = config.ConnectionConfig(kind=kind)
  model = dataclasses.replace(base.model, connection=connection)
  settings = dataclasses.replace(base, model=model)
  run.train(settings, folder / kind, label=kind)
  trained[kind] = [results.read(folder / kind)]

# %% [markdown]
# The composite gain over training, the largest over depth. HC's leaves 1 within
# a few steps; mHC's forward gain is 1 by construction, and its backward gain
# stays as near to it as twenty iterations bring the columns.

# %%
plots.gains_over_training(trained)

# %% [markdown]
# The gains over depth at the end of training: each mapping alone on the left,
# composed on the right.

# %%
plots.gains_over_depth(trained)

# %% [markdown]
# The mappings themselves, averaged over tokens. Row sums stand on the right of
# each, column sums below it.

# %%
plots.mappings(trained)

# %% [markdown]
# And the gradient norms. A large gain need not hurt the loss of a small
# model; docs/results.md says when it does.

# %%
plots.grad_norm(trained)
