# %% [markdown]
# # mHC in your own model
#
# A connection wraps a sub-layer of any Flax model: five lines change. This
# notebook puts mHC into a small classifier, counts what it adds, trains it next
# to the plain residual and to HC in seconds, and looks at its gradients. It
# needs the library and Optax alone.

# %% install mhc-jax optax matplotlib

# %%
from mhc.runtime import machine

machine.skip_search()
print(machine.describe())

# %% [markdown]
# ## The model
#
# The plain network would be `x = x + F(norm(x))`, block after block. Five lines
# change, which are numbered: a connection is made, the sub-layer reads what
# `pre` gives and returns to `post`, and the streams are opened once before the
# first block and closed once after the last. The norm stays directly behind
# `pre`; `index` counts the sub-layers, so that each first reads another stream.
# `mhc.Residual` and `mhc.HC` have the same interface.

# %%
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mhc

WIDTH, STREAMS, BLOCKS = 32, 4, 3
CONNECTIONS = {
  'residual': lambda index: mhc.Residual(),
  'HC': lambda index: mhc.HC(WIDTH, STREAMS, index),
  'mHC': lambda index: mhc.MHC(WIDTH, STREAMS, index),
}


class Block(nnx.Module):
  def __init__(self, kind, index, *, rngs):
    self.connection = CONNECTIONS[kind](index)  # 1
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x):  # [points, streams, width]
    h, context = self.connection.pre(x)  # 2
    y = nnx.gelu(self.linear(self.norm(h)))  # the sub-layer, unchanged
    return self.connection.post(y, context)  # 3


class Classifier(nnx.Module):
  def __init__(self, kind, seed=0):
    rngs = nnx.Rngs(seed)
    self.num_streams = 1 if kind == 'residual' else STREAMS
    self.enter = nnx.Linear(2, WIDTH, rngs=rngs)
    self.blocks = nnx.Sequential(
      *[Block(kind, index, rngs=rngs) for index in range(BLOCKS)]
    )
    self.collapse = mhc.Collapse('mean', WIDTH, self.num_streams)
    self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.leave = nnx.Linear(WIDTH, 2, rngs=rngs)

  def __call__(self, points):  # [points, 2]
    x = mhc.expand(self.enter(points), self.num_streams)  # 4
    x = self.collapse(self.blocks(x))  # 5
    return self.leave(self.norm(x))


# %% [markdown]
# `nnx.split` makes a model a tree of arrays and a description, and JAX's own
# transformations take functions of that tree.


# %%
def pure(kind):
  """The parameters of a classifier, and a function of them and of points."""
  graphdef, params = nnx.split(Classifier(kind))
  return params, jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))


starts, apply = {}, {}
for kind in CONNECTIONS:
  starts[kind], apply[kind] = pure(kind)

# %% [markdown]
# ## Something to learn: two spirals
#
# The first 400 points have labels. The others are a grid, for a picture of what
# has been learnt in between.

# %%
rng = np.random.default_rng(0)
labels = np.arange(400) % 2
radius = rng.uniform(0.15, 1, 400)
angle = 7 * radius + np.pi * labels
spirals = (radius * np.stack([np.cos(angle), np.sin(angle)])).T
spirals += 0.02 * rng.normal(size=(400, 2))
side = np.linspace(-1.15, 1.15, 60)
grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
points = jnp.asarray(np.concatenate([spirals, grid]), jnp.float32)

# %% [markdown]
# ## What the connection adds
#
# A network with mHC starts as the plain one with the same weights, but for the
# eps of the norms. A connection of n streams of width d has
# (nd + 1)(2n + n²) + 3 parameters.

# %%
plain = apply['residual'](starts['residual'], points)
for kind, params in starts.items():
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  difference = jnp.abs(apply[kind](params, points) - plain).max()
  print(f'{kind:9}{total:7,} parameters; logits differ by {difference:.0e}')
count = (STREAMS * WIDTH + 1) * (2 * STREAMS + STREAMS**2) + 3
print(f'{count:,} in each of the {BLOCKS} mHC connections')

# %% [markdown]
# ## Training
#
# An ordinary loop of Optax. The biases and gates of a connection are exempt
# from weight decay; `phi` (in HC `theta`) decays like other matrices.

# %%
STEPS = 100


def decays(params):
  """Whether each parameter is a matrix that weight decay is meant for."""
  matrices = ('kernel', 'phi', 'theta')
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(m in jax.tree_util.keystr(path) for m in matrices),
    params,
  )


optimizer = optax.adamw(
  optax.cosine_decay_schedule(1e-2, STEPS), weight_decay=0.01, mask=decays
)


def make_step(kind):
  def loss(params):
    logits = apply[kind](params, points[:400])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return each.mean()

  @jax.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value, gradient

  return step


# %%
trained, losses, gradients = {}, {}, {}
for kind, params in starts.items():
  step, state, losses[kind] = make_step(kind), optimizer.init(params), []
  for number in range(STEPS):
    params, state, value, gradient = step(params, state)
    losses[kind].append(float(value))
    if kind == 'mHC' and number in (0, 1, STEPS - 1):
      gradients[number] = gradient
  trained[kind] = params
  right = apply[kind](params, points)[:400].argmax(-1) == labels
  print(f'{kind:9}loss {value:.4f}, {right.mean():.1%} right')

# %%
COLORS = {'residual': '#555555', 'HC': '#D55E00', 'mHC': '#0072B2'}
figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout='constrained')
for axis, (kind, params) in zip(axes[1:], trained.items(), strict=True):
  axes[0].plot(losses[kind], color=COLORS[kind], label=kind)
  chance = jax.nn.softmax(apply[kind](params, points))[400:, 1]
  axis.contourf(side, side, chance.reshape(60, 60), 12, cmap='PuOr', alpha=0.7)
  axis.scatter(*spirals.T, c=labels, s=5, cmap='PuOr')
  axis.set(title=kind, xticks=[], yticks=[], aspect='equal')
axes[0].set(xlabel='step', title='loss', yscale='log')
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The gradient
#
# At the first step `phi` is zero, so that its gate `alpha` gets no gradient,
# and the streams are still copies, whose mixing changes nothing. A step later
# both have one.

# %%
print(f'{"last block":12}{"phi":>9}{"alpha":>9}{"of H_res":>9}{"linear":>9}')
for number, gradient in gradients.items():
  own = gradient['blocks']['layers'][BLOCKS - 1]
  connection, kernel = own['connection'], own['linear']['kernel']
  parts = [connection['phi'], connection['alpha']]
  parts = [jax.tree.leaves(part)[0] for part in (*parts, kernel)]
  parts.insert(2, jax.tree.leaves(connection['bias'])[0][2 * STREAMS :])
  norms = ''.join(f'{jnp.linalg.norm(part):9.1e}' for part in parts)
  print(f'step {number + 1:<7}{norms}')

# %% [markdown]
# ## What it has learnt to mix
#
# `mappings` gives H_pre, H_post and H_res of tokens, and `mhc.gains` says what
# the product of the H_res does. mHC's gain is 1 forward by construction;
# backward it is as near to 1 as twenty iterations bring the columns.

# %%
for kind in ('HC', 'mHC'):
  model = Classifier(kind)
  nnx.update(model, trained[kind])

  @jax.jit
  def mixing(points, model=model):
    x, matrices = mhc.expand(model.enter(points), STREAMS), []
    for block in model.blocks.layers:
      matrices.append(block.connection.mappings(x).res)
      x = block(x)
    products, _ = mhc.gains.composites(jnp.moveaxis(jnp.stack(matrices), -1, 1))
    return mhc.gains.amax_gain(products[-1])

  forward, backward = (gain.mean() for gain in mixing(points[:400]))
  print(f'{kind:4} gain forward {forward:.3f}, backward {backward:.3f}')

# %% [markdown]
# One call more makes it faster on a TPU: from a sub-layer straight to the next,
# `h, context = following.advance(y, context)` is `pre` after `post` in one pass
# over the streams. Without Flax NNX, `mhc.functional` has the same as functions
# of plain arrays.
