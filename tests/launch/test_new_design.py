"""A residual design is added as docs/connections.md says, and gets a report."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import quick_compilation

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASS = '''
class Gated(nnx.Module):
  """x_j + gate_j F(mean of x)."""

  def __init__(self, num_streams):
    self.gate = nnx.Param(jnp.ones(num_streams, jnp.float32))

  def pre(self, x):
    n, tokens = x.shape[-2], functional.tokens(x)
    shape = n, len(tokens)
    read = jnp.full(shape, 1 / n, jnp.float32)
    write = jnp.broadcast_to(self.gate[...][:, None], shape)
    context = Context(x, Mappings(read, write, None))
    observation.record(*context)
    return functional.read(x, read), context

  def post(self, y, context):
    return functional.post(y, context)

  def advance(self, y, context):
    return self.pre(self.post(y, context))
'''
# (file, where, what is put before it): the steps of "Add a design".
STEPS = (
  ('mhc/connections.py', 'class MHC(nnx.Module):', CLASS.lstrip() + '\n\n'),
  ('mhc/config/model.py', "  'hc',\n", "  'gated',\n"),
  (
    'mhc/model/residual.py',
    "    case 'hc':\n",
    "    case 'gated':\n      return connections.Gated(config.streams)\n",
  ),
  (
    'mhc/model/parameters.py',
    "  _small('*_connection/gain'),\n",
    "  _small('*_connection/gate'),\n",
  ),
)
CONFIG = """
import ml_collections
from mhc import config
from mhc.config import comparison, dicts

def get_config():
  base = config.Config(
    model=config.ModelConfig(dim=16, ffn_dim=16),
    data=config.DataConfig(seq_len=16, path=PATH),
    optimizer=config.OptimizerConfig(warmup_steps=1),
    eval_every=0, eval_sequences=4, final_sequences=4, probe_every=2,
  )
  panel = comparison.Panel(
    kinds=('residual', 'gated'), seeds=(0, 1), num_steps=4, batch_size=2,
    num_blocks=(1,), contrasts=(('gated', 'residual'),),
  )
  made = comparison.Comparison(base, {'main': panel})
  return ml_collections.ConfigDict(dicts.to_dict(made))
"""


def test_a_design_by_the_documentation_works_to_the_report(
  tmp_path, text, compiled
):
  for folder in ('mhc', 'launch', 'configs'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
  (tmp_path / 'mhc' / 'kernels').symlink_to(ROOT / 'kernels')
  for file, where, added in STEPS:
    source = (tmp_path / file).read_text()
    assert source.count(where) == 1, (file, where)
    (tmp_path / file).write_text(source.replace(where, added + where))
  config = tmp_path / 'own.py'
  config.write_text(CONFIG.replace('PATH', repr(text)))
  result = subprocess.run(
    [
      *(sys.executable, tmp_path / 'launch' / 'compare.py'),
      *(f'--config={config}', f'--workdir={tmp_path / "run"}'),
    ],
    capture_output=True,
    text=True,
    env=os.environ
    | quick_compilation.environment(compiled)
    | {'PYTHONPATH': str(tmp_path)},
    check=False,
  )
  assert result.returncode == 0, result.stderr
  values = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert {row['variant'] for row in values['rows']} == {'residual', 'gated'}
  (contrast,) = values['contrasts']
  assert (contrast['kind'], contrast['other']) == ('gated', 'residual')
  report = (tmp_path / 'run' / 'report.md').read_text()
  assert re.search(r'\bgated - residual\b', report)
