"""A design from outside, as docs/own_design.md says, up to its report."""

import json
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs' / 'own_design.md').read_text()
FILES = 'gated.py', 'own.py'
SMALLER = (
  ('num_steps=40', 'num_steps=6'),
  ('num_blocks=(2,)', 'num_blocks=(1,)'),
  ('warmup_steps=5', 'warmup_steps=2'),
  ('ffn_dim=64)', 'ffn_dim=64, recompute="none")'),
)


@pytest.fixture
def folder(tmp_path, text):
  """The files of the page; the text is a small one."""
  blocks = re.findall(r'```python\n(.*?)```', PAGE, re.S)
  (tmp_path / 'designs').mkdir()
  for name, block in zip(FILES, blocks, strict=True):
    block = block.replace('seq_len=32', f'seq_len=32, path={text!r}')
    for old, new in SMALLER:
      block = block.replace(old, new)
    (tmp_path / 'designs' / name).write_text(block)
  return tmp_path


def test_it_is_compared_and_reported(launch, folder):
  command = re.search(r'python launch/(compare.py .*)', PAGE)[1]
  result = launch(*shlex.split(command), cwd=folder)
  assert result.returncode == 0, result.stderr
  values = json.loads((folder / 'runs/own/results.json').read_text())
  assert {r['variant'] for r in values['rows']} == {'residual', 'mhc', 'gated'}
  (contrast,) = values['contrasts']
  assert (contrast['kind'], contrast['other']) == ('gated', 'mhc')
  report = (folder / 'runs/own/report.md').read_text()
  assert re.search(r'\bgated - mHC\b', report)
  kept = next((folder / 'runs/own/main').glob('gated*'))
  told = json.loads((kept / 'config.json').read_text())
  assert told['model']['connection']['kind'] == 'gated:Gated'
  line = (kept / 'probes.jsonl').read_text().split('\n')[0]
  assert 'gain' in line
  evaluate = 'evaluate.py', f'--workdir={kept}', '--sequences=4'
  again = launch(*evaluate, cwd=folder)
  assert again.returncode == 2
  assert 'PYTHONPATH' in again.stderr
  assert again.stderr.count('\n') == 1
  designs = str(folder / 'designs')
  found = launch(*evaluate, cold=True, cwd=folder, PYTHONPATH=designs)
  assert found.returncode == 0, found.stderr
