# %% [markdown]
# # A comparison of residual designs, inline
#
# `make compare` and `launch/compare.py` train designs side by side and end in a
# report whose differences carry their uncertainty. This notebook calls the same
# functions for a comparison of a minute: plan, training that can be stopped and
# goes on, results as a table, and the verdict on what was declared before.

# %% install mhc-jax[train] pandas

# %%
from mhc.runtime import machine

machine.skip_search()
print(machine.describe())

# %% [markdown]
# ## What is compared
#
# A panel trains every design with every seed, on the same data in the same
# order with the same initial weights. Its contrasts are declared before the
# first run. `configs/compare.py` is the comparison that the README reports; the
# one here is far too small to tell designs apart.

# %%
import pathlib
import tempfile

from mhc import config
from mhc.config import comparison as comparison_lib

workdir = pathlib.Path(tempfile.gettempdir()) / 'mhc_compare'
comparison = comparison_lib.Comparison(
  base=config.Config(
    model=config.ModelConfig(dim=32, ffn_dim=64, recompute='none'),
    data=config.DataConfig(seq_len=32),
    optimizer=config.OptimizerConfig(schedule='cosine', warmup_steps=5),
    mesh=config.MeshConfig(num_devices=1),
    eval_every=0,
    final_sequences=128,
    probe_every=10,
    checkpoint_every=0,
  ),
  panels={
    'main': comparison_lib.Panel(
      title='Two blocks, twenty steps',
      kinds=('residual', 'mhc'),
      seeds=(0, 1, 2, 3),
      num_blocks=(2,),
      learning_rates=(1e-2,),
      num_steps=20,
      batch_size=8,
      contrasts=(('mhc', 'residual'),),
    )
  },
)

# %% [markdown]
# ## The plan
#
# `prepare` checks all settings, the data and the folder, and writes down what
# is declared; a folder that holds another comparison is refused. Two short
# programs are timed, from which the plan predicts the minutes.

# %%
from mhc.experiments import plan
from mhc.experiments import run_all

jobs = run_all.prepare(comparison, workdir)
lines = plan.predict(jobs, plan.calibrate(jobs))
print(plan.describe(jobs, lines, num_workers=1))

# %% [markdown]
# ## Training
#
# The bar shows how much of all runs is done. The stop button (*Interrupt*)
# saves the run at hand after its step and ends the cell; press it once, since a
# second time ends Python. The next cell goes on with the same step, and so does
# this notebook when it is opened again on the same machine.

# %%
from mhc.experiments import progress
from mhc.runtime import multihost


def train():
  """Trains what is left to do."""
  with progress.Progress(jobs):
    try:
      run_all.train_all(comparison, workdir, bars=False)
    except (multihost.RunStopped, KeyboardInterrupt) as stopped:
      print(f'{stopped or "interrupted"}; the next cell goes on')


train()

# %% [markdown]
# Going on, after a stop; otherwise nothing is left to do:

# %%
train()

# %% [markdown]
# ## Results
#
# `render` computes the report from the runs' files: report.html, results.json,
# results.csv and figures. It returns what is in results.json. A verdict needs
# four seeds.

# %%
from mhc.experiments import report

values = report.render(workdir)
print(report.summary(values))

# %%
import pandas as pd

rows = pd.DataFrame(values['rows']).set_index(['variant', 'seed'])
rows[['heldout_nats', 'gap_nats', 'gain_max', 'grad_norm_max', 'params']].round(
  4
)

# %% [markdown]
# The contrasts with their intervals: dots are seeds, the band is the margin
# within which designs count as equivalent.

# %%
from mhc.experiments import figures

get_ipython().run_line_magic('matplotlib', 'inline')  # shows figures
figures.forest(values['contrasts'])

# %% [markdown]
# The losses, and the gain of all mappings together:

# %%
from mhc.experiments import plots
from mhc.experiments import results

panels = results.read_comparison(workdir).panels
by_kind = {}
for finished in panels['main']:
  by_kind.setdefault(finished.variant, []).append(finished)
plots.loss(by_kind)

# %%
plots.gains_over_training(by_kind)

# %%
print(f'the whole report: {workdir / "report.html"}')
