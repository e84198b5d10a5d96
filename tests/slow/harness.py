"""Runs the real lm-evaluation-harness on a run, with the network off.

    python tests/slow/harness.py --folder=/tmp/harness

Makes an environment with a wheel of this repository, its extras `train` and
`eval`. There a tiny run is trained, small files in the formats of piqa,
hellaswag and gsm8k are written, and `mhc-harness` reads them. The table must
have the values, standard errors and chance levels that follow from the files, a
thousand requests must take less than a minute, and the other five benchmarks
must run, all of their parts.
Needs the network for pip, PyPI alone.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

from mhc.evaluation import tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = 60
REQUESTS = 1000
SMALL = (
  '--config.num_steps=2',
  '--config.optimizer.warmup_steps=1',
  '--config.model.num_blocks=1',
  '--config.model.dim=16',
  '--config.model.ffn_dim=16',
  '--config.data.seq_len=64',
  '--config.data.batch_size=2',
  '--config.eval_sequences=2',
)
OFFLINE = {
  'HF_HUB_OFFLINE': '1',
  'HF_DATASETS_OFFLINE': '1',
  # Whoever asks nevertheless gets no answer.
  'HTTP_PROXY': 'http://127.0.0.1:9',
  'HTTPS_PROXY': 'http://127.0.0.1:9',
}
# A document of each of the others.
ANSWER = {
  'number': '3',
  'date': {'day': '', 'month': '', 'year': ''},
  'spans': [],
}
FEW = {
  'bbh': {'input': 'not True is', 'target': 'False'},
  'drop': {
    'passage': 'There are 3.',
    'question': 'How many?',
    'answer': ANSWER,
    'validated_answers': {
      'number': ['3'],
      'date': [ANSWER['date']],
      'spans': [['three']],
    },
  },
  'minerva_math': {'problem': '1 + 1?', 'solution': r'It is $\boxed{2}$.'},
  'mmlu': {'question': 'Which?', 'choices': [*'abcd'], 'answer': 2},
  'triviaqa': {'question': 'Who', 'answer': {'aliases': ['He', 'him']}},
}
# The accuracy of piqa, by whole rows without buckets; argv: run, data.
ALONE = """
import json, sys
import jax, numpy as np
from flax import nnx
from mhc.runtime import paths
from mhc.training import generate
model, bias, tokenizer = generate.restore(paths.path(sys.argv[1]))
graphdef, params = nnx.split(model)
run = jax.jit(lambda params, row: jax.nn.log_softmax(
  nnx.merge(graphdef, params)(row, bias)[0]))
right = []
for line in open(sys.argv[2]):
  doc = json.loads(line)
  start = f"Question: {doc['goal']}\\nAnswer:".encode()
  scores = []
  for choice in (doc['sol1'], doc['sol2']):
    new = f' {choice}'.encode()
    row = np.array([256, *start, *new], np.int32)[-65:]
    found = run(params, np.pad(row[:-1], (0, 65 - len(row)))[None])
    places = np.arange(len(row) - 1)[-len(new):]
    scores.append(float(found[places, row[places + 1]].sum()))
  right.append(int(np.argmax(scores)) == doc['label'])
print('RIGHT', np.mean(right))
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', help='Keep the environment there.')
  folder = parser.parse_args().folder
  if folder:
    prove(pathlib.Path(folder).resolve())
    return
  with tempfile.TemporaryDirectory() as temporary:
    prove(pathlib.Path(temporary))


def prove(folder: pathlib.Path):
  folder.mkdir(parents=True, exist_ok=True)
  python = environment(folder)
  write_files(folder / 'data')
  text = folder / 'text.txt'
  text.write_text('What is it? It is this.\n' * 400)
  runs = [str(folder / name) for name in ('one', 'two')]
  for number, run in enumerate(runs):
    call(
      python,
      *('-m', 'mhc.launch.train', '--config=tiny', f'--workdir={run}'),
      *(f'--config.data.path={text}', f'--config.seed={number}', *SMALL),
    )
  harness = ('-m', 'mhc.launch.harness', f'--data={folder / "data"}')
  out = folder / 'out'
  printed = call(
    python,
    *(*harness, '--tasks=piqa,hellaswag,gsm8k', f'--out={out}'),
    f'--workdir={",".join(runs)}',
  )
  check_table(printed, out, runs)
  alone = call(
    python, '-c', ALONE, runs[0], folder / 'data/piqa/validation.jsonl'
  )
  (value,) = (
    row['value']
    for row in json.loads((out / 'results.json').read_text())['rows']
    if (row['run'], row['task'], row['metric']) == (runs[0], 'piqa', 'acc')
  )
  right = float(alone.split('RIGHT ')[1].split()[0])
  assert math.isclose(right, value, abs_tol=1e-9), (right, value)
  check_rate(python, folder, runs[0])
  check_groups(python, folder, runs[0])
  missing = call(
    python,
    *harness,
    '--tasks=drop',
    f'--out={out}',
    f'--workdir={runs[0]}',
    status=2,
  )
  assert f'{folder}/data/drop/train.jsonl does not exist' in missing, missing
  print('the harness agrees')


def environment(folder: pathlib.Path) -> pathlib.Path:
  """The Python of an environment with the extras; of one that is there, it."""
  python = folder / 'venv' / 'bin' / 'python'
  if not python.exists():
    subprocess.run([sys.executable, '-m', 'venv', folder / 'venv'], check=True)
  pip = (python, '-m', 'pip', '--disable-pip-version-check', '-q')
  wheels = folder / 'wheels'
  for old in wheels.glob('*.whl'):
    old.unlink()
  subprocess.run(
    [*pip, 'wheel', '--no-deps', '--wheel-dir', wheels, ROOT], check=True
  )
  (wheel,) = wheels.glob('*.whl')
  # The wheel anew, whose version stays the same, and what it needs if absent.
  install = (*pip, 'install', '-c', ROOT / 'constraints.txt')
  subprocess.run([*install, f'{wheel}[train,eval]'], check=True)
  subprocess.run(
    [*install, '--no-deps', '--force-reinstall', wheel], check=True
  )
  return python


def write_files(data: pathlib.Path):
  """Random documents with the columns of the data sets."""
  rng = np.random.default_rng(0)

  def words(number):
    return ' '.join(rng.choice(['red', 'fox', 'is', 'a', 'tree'], number))

  def piqa():
    return {
      'goal': words(6),
      'sol1': words(4),
      'sol2': words(4),
      'label': int(rng.integers(2)),
    }

  def hellaswag():
    return {
      'activity_label': words(1),
      'ctx_a': words(5),
      'ctx_b': words(2),
      'endings': [words(4) for _ in range(4)],
      'label': str(rng.integers(4)),
    }

  def gsm8k():
    return {'question': words(8), 'answer': f'{words(5)}\n#### 7'}

  for make, splits in (
    (piqa, ('validation',)),
    (hellaswag, ('train', 'validation')),
    (gsm8k, ('train', 'test')),
  ):
    for split in splits:
      file = data / make.__name__ / f'{split}.jsonl'
      file.parent.mkdir(parents=True, exist_ok=True)
      lines = (json.dumps(make()) for _ in range(DOCUMENTS))
      file.write_text('\n'.join(lines) + '\n')


def check_table(printed, out, runs):
  found = json.loads((out / 'results.json').read_text())
  chances = {'piqa': 0.5, 'hellaswag': 0.25, 'gsm8k': 0.0}
  seen = {(row['run'], row['task']) for row in found['rows']}
  assert seen == {(run, task) for run in runs for task in chances}, seen
  for row in found['rows']:
    p, n = row['value'], row['documents']
    assert n == DOCUMENTS, row
    assert row['chance'] == chances[row['task']], row
    error = math.sqrt(p * (1 - p) / (n - 1))
    assert abs(row['standard_error'] - error) < 1e-6, row
    bound = 2 * max(error, math.sqrt(row['chance'] * (1 - row['chance']) / n))
    is_near = abs(p - row['chance']) <= bound
    assert (row['verdict'] == 'at chance') == is_near, row
  table = (out / 'table.md').read_text()
  assert table.strip() in printed, printed
  assert 'at chance' in table, table
  assert 'no ranking' in table, table
  # Eight shots of gsm8k are longer than the rows of this model.
  assert all(found['runs'][run]['truncated']['requests'] for run in runs), found
  print(table)


def check_rate(python, folder, run):
  """A thousand requests take less than a minute, compilation included."""
  file = folder / 'many' / 'piqa' / 'validation.jsonl'
  file.parent.mkdir(parents=True, exist_ok=True)
  few = (folder / 'data/piqa/validation.jsonl').read_text()
  file.write_text(few * (1 + REQUESTS // DOCUMENTS))
  call(
    python,
    *('-m', 'mhc.launch.harness', '--tasks=piqa', f'--workdir={run}'),
    *(f'--data={folder / "many"}', f'--out={folder / "rate"}'),
    f'--limit={REQUESTS // 2}',
  )
  found = json.loads((folder / 'rate' / 'results.json').read_text())
  record = found['runs'][run]
  print(f'{record["requests"]} requests in {record["seconds"]:.1f} s')
  assert record['requests'] == REQUESTS, record
  assert record['seconds'] < 60, record


def check_groups(python, folder, run):
  """The other five, two documents a task, in the columns of their data."""
  shipped = next(folder.glob('venv/lib/*/site-packages/lm_eval/tasks'))
  names, data = (
    ('bbh', 'drop', 'minerva_math', 'mmlu', 'triviaqa'),
    folder / 'few',
  )
  shutil.rmtree(data, ignore_errors=True)
  while True:
    try:
      tasks.local_tasks(names, data, folder / 'definitions', shipped)
      break
    except ValueError as error:
      file = pathlib.Path(str(error).split(' does not exist')[0])
      if data not in file.parents:
        raise
      file.parent.mkdir(parents=True, exist_ok=True)
      document = FEW[file.relative_to(data).parts[0]]
      names_of = [{'id': n, 'query_id': str(n)} for n in range(8)]
      lines = [json.dumps(document | one) for one in names_of]
      file.write_text('\n'.join(lines))
  call(
    python,
    *('-m', 'mhc.launch.harness', f'--tasks={",".join(names)}'),
    *(f'--data={data}', f'--out={folder / "groups"}', f'--workdir={run}'),
    '--limit=2',
  )
  found = json.loads((folder / 'groups' / 'results.json').read_text())
  rows = {(row['task'], row['metric']): row for row in found['rows']}
  for task, metric, parts, chance in (
    ('bbh', 'exact_match, get-answer', 27, 0),
    ('drop', 'em', 1, 0),
    ('minerva_math', 'exact_match', 7, 0),
    ('mmlu', 'acc', 57, 0.25),
    ('triviaqa', 'exact_match, remove_whitespace', 1, 0),
  ):
    row = rows[task, metric]
    assert (row['documents'], row['chance']) == (2 * parts, chance), row
    print(f'{task}, {metric}: {row["documents"]} documents')


def call(python, *arguments, status=0) -> str:
  """What a program prints in the environment, without a network."""
  unset = ('JAX_PLATFORMS', 'XLA_FLAGS', 'PYTHONPATH')
  variables = {k: v for k, v in os.environ.items() if k not in unset}
  done = subprocess.run(
    [python, *arguments],
    capture_output=True,
    text=True,
    env=variables | OFFLINE,
    # Not a clone, whose mhc/ Python would take for the package.
    cwd=tempfile.gettempdir(),
    check=False,
  )
  if done.returncode != status:
    sys.exit(
      f'{arguments} ended with {done.returncode}:\n{done.stdout[-4000:]}'
      f'\n{done.stderr[-4000:]}'
    )
  return done.stdout + done.stderr


if __name__ == '__main__':
  main()
