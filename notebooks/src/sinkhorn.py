# %% [markdown]
# # The projection onto doubly stochastic matrices
#
# mHC mixes residual streams with matrices that have no negative entry and whose
# rows and columns sum to 1. This notebook shows how the Sinkhorn-Knopp
# iteration makes such a matrix out of any other, how fast it converges, what
# its gradient is, and what becomes of products of the results. It needs the
# library alone and runs in seconds on any machine.

# %% install mhc-jax matplotlib

# %%
from mhc.runtime import machine

machine.skip_search()
print(machine.describe())

# %% [markdown]
# ## One matrix
#
# `sinkhorn_project` takes the exponential of a matrix of logits and then
# divides columns and rows by their sums, in turn, twenty times. The pictures
# show the start and four numbers of iterations. Row sums stand on the right,
# column sums below. Each iteration ends with the rows, which are therefore
# exact; what the iteration has left to do shows in the columns.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mhc


def show(matrices, titles, signed=False):
  """Draws matrices with their row sums (right) and column sums (below)."""
  matrices = np.asarray(matrices)
  limit = np.abs(matrices).max() if signed else 1.0
  number, n, _ = matrices.shape
  _, axes = plt.subplots(
    1,
    number,
    figsize=(0.5 * n * number + 0.5, 0.5 * n + 0.6),
    layout='constrained',
    squeeze=False,
  )
  for axis, matrix, title in zip(axes[0], matrices, titles, strict=True):
    cmap = 'RdBu_r' if signed else 'Blues'
    axis.imshow(matrix, cmap=cmap, vmin=-limit if signed else 0, vmax=limit)
    for (i, j), value in np.ndenumerate(matrix):
      color = 'white' if abs(value) > 0.6 * limit else 'black'
      text = f'{value:.2f}'.replace('-0.00', '0.00')
      axis.text(j, i, text, ha='center', va='center', fontsize=7, color=color)
    for which, sums in (('x', matrix.sum(0)), ('y', matrix.sum(1))):
      words = [f'{total:.2f}'.replace('-0.00', '0.00') for total in sums]
      getattr(axis, f'set_{which}ticks')(range(n), words, fontsize=7)
    axis.yaxis.tick_right()
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9)
  plt.show()


logits = 2 * jax.random.normal(jax.random.key(0), (4, 4))
steps = {f'{t} iterations': mhc.sinkhorn_project(logits, t) for t in (2, 5, 20)}
show(
  [
    jax.nn.softmax(logits, axis=0),
    mhc.sinkhorn_project(logits, 1),
    *steps.values(),
  ],
  ['columns divided', '1 iteration', *steps],
)

# %% [markdown]
# ## How fast it converges
#
# The distance of the columns from a sum of 1 falls geometrically, the slower
# the further the logits are apart. mHC's logits start 6 apart and the paper
# iterates 20 times. The bands hold nine of ten of 2,000 random matrices.

# %%
SPREADS = (1.0, 2.0, 4.0)
ITERATIONS = (1, 2, 3, 5, 8, 12, 20, 32)

draws = jax.random.normal(jax.random.key(1), (2000, 4, 4))
draws = jnp.stack([spread * draws for spread in SPREADS])
columns, rows = [], []
for t in ITERATIONS:
  row, column = mhc.manifold.residuals(mhc.sinkhorn_project(draws, t))
  rows.append(float(row.max()))
  columns.append(np.maximum(column, 3e-8))
columns = np.array(columns)  # [iterations, spreads, matrices]

figure, axis = plt.subplots(figsize=(6, 3.6), layout='constrained')
for number, spread in enumerate(SPREADS):
  low, middle, high = np.quantile(columns[:, number], (0.05, 0.5, 0.95), axis=1)
  (line,) = axis.plot(
    ITERATIONS, middle, marker='o', label=f'logits {spread:g} N(0, 1)'
  )
  axis.fill_between(ITERATIONS, low, high, color=line.get_color(), alpha=0.15)
axis.axvline(20, color='black', linewidth=0.8, linestyle=':')
axis.set(xlabel='iterations', ylabel='largest |column sum - 1|', yscale='log')
axis.legend(frameon=False)
plt.show()
print(f'largest |row sum - 1| of all: {max(rows):.1e}')

# %% [markdown]
# ## The gradient
#
# A constant that is added to a row or a column of the logits is divided away
# again, so that the gradient of any function of the result sums to zero along
# rows and columns. The pictures are the gradients of single entries. To raise
# one, the projection lowers its row and its column.

# %%
entry = lambda logits, i, j: mhc.sinkhorn_project(logits)[i, j]
chosen = ((0, 0), (1, 3), (3, 3))
show(
  [jax.grad(entry)(logits, i, j) for i, j in chosen],
  [f'gradient of entry {i}, {j}' for i, j in chosen],
  signed=True,
)

# %% [markdown]
# The backward pass has three implementations. `recompute`, the default, keeps
# the logits alone and walks back through the iteration; `unrolled` is autodiff,
# which keeps every step; `implicit` solves for the gradient of the limit, which
# is another function where twenty iterations have not converged. The numbers
# are errors relative to `unrolled`, of a thousand random matrices.

# %%
cotangent = jax.random.normal(jax.random.key(2), (1000, 4, 4))


def gradient(backward):
  def loss(logits):
    out = mhc.sinkhorn_project(logits, backward=backward)
    return jnp.sum(out * cotangent)

  return jax.jit(jax.grad(loss))(draws[:, :1000])


exact = gradient('unrolled')
print(f'{"logits":24}{"median":>10}{"99th percentile":>18}')
for backward in ('recompute', 'implicit'):
  error = jnp.linalg.norm(gradient(backward) - exact, axis=(-2, -1))
  error /= jnp.linalg.norm(exact, axis=(-2, -1))
  for number, spread in enumerate(SPREADS):
    middle, high = np.percentile(error[number], (50, 99))
    name = f'{backward}, {spread:g} N(0, 1)'
    print(f'{name:24}{middle:10.0e}{high:18.0e}')

# %% [markdown]
# ## Products
#
# A network multiplies the mappings of its sub-layers. The product of doubly
# stochastic matrices is doubly stochastic again, whatever the depth, and draws
# near to 1/n: what is common to the streams passes unchanged, differences
# between them fade.

# %%
DEPTH, TOKENS = 64, 256

noise = jax.random.normal(jax.random.key(3), (DEPTH, TOKENS, 4, 4))
projected = mhc.sinkhorn_project(noise + 6 * jnp.eye(4) - 3)
products, _ = mhc.gains.composites(projected)
depths = (1, 8, 16, 64)
show([products[d - 1, 0] for d in depths], [f'product of {d}' for d in depths])

# %% [markdown]
# Hyper-Connections mix without constraint: mappings near the identity multiply
# to gains that grow with depth. The gain of a matrix is the largest absolute
# row sum, what a signal that is alike in all streams can grow by.

# %%
free, _ = mhc.gains.composites(jnp.eye(4) + 0.1 * noise)
figure, axis = plt.subplots(figsize=(6, 3.4), layout='constrained')
for name, color, matrices in (
  ('HC, I + 0.1 N(0, 1)', '#D55E00', free),
  ('mHC, projected', '#0072B2', products),
):
  gain, _ = mhc.gains.amax_gain(matrices)
  low, middle, high = np.quantile(gain, (0.05, 0.5, 0.95), axis=1)
  depth = np.arange(1, DEPTH + 1)
  axis.plot(depth, middle, color=color, label=name)
  axis.fill_between(depth, low, high, color=color, alpha=0.15)
axis.set(xlabel='sub-layers', ylabel='gain of the product', yscale='log')
axis.legend(frameon=False)
plt.show()
row, column = mhc.manifold.residuals(products[-1])
for name, sums in (('row', row), ('column', column)):
  middle, most = float(jnp.median(sums)), float(sums.max())
  print(f'|{name} sum - 1| of mHC: median {middle:.0e}, largest {most:.0e}')

# %% [markdown]
# What twenty iterations leave in the columns of single mappings adds up in the
# product's. What the differences between the streams lose, and what gains a
# trained model has, is in the notebook `gains`.
