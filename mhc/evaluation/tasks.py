"""The mHC paper's eight benchmarks, from the hub or from files of this machine.

`lm_eval` ships each task as a file that says where its data is on the Hugging
Face hub. Here are files that include those and change the number of examples
(shots) to the paper's. With a data folder they read JSON lines in its place,
which have the columns of the same data set:

    task           shots  files of the data folder
    bbh            3      bbh/SUBTASK.jsonl, such as bbh/navigate.jsonl
    drop           3      drop/{train,validation}.jsonl
    gsm8k          8      gsm8k/{train,test}.jsonl
    hellaswag      10     hellaswag/{train,validation}.jsonl
    minerva_math   4      minerva_math/SUBJECT.jsonl, such as .../algebra.jsonl
    mmlu           5      mmlu/SUBJECT/{dev,test}.jsonl, .../anatomy/dev.jsonl
    piqa           0      piqa/validation.jsonl
    triviaqa       5      triviaqa/{train,validation}.jsonl

SUBTASK and SUBJECT are the configurations of the data sets on the hub; a group
needs all of its own: 27, 7 and 57. The shots of bbh (with chains of thought)
and of minerva_math are in the tasks themselves.
"""

from collections.abc import Sequence
import importlib.util
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from mhc.runtime import paths

MISSING = (
  'the benchmarks need lm_eval, which is not installed: '
  "pip install 'mhc-jax[eval]'"
)


class Benchmark(NamedTuple):
  """A task of the harness, or a group of them, and its local files.

  Attributes:
    shots: examples before each question.
    pattern: the shipped files, below lm_eval's folder of tasks.
    files: split -> file of the data; {} is the name of a part of a group.
    unused: settings of splits that there is no file for.
    metrics: what a group averages over its documents: (metric, filter).
  """

  shots: int
  pattern: str
  files: dict[str, str]
  unused: tuple[str, ...] = ()
  metrics: tuple[tuple[str, str], ...] = ()

  @property
  def is_group(self) -> bool:
    return bool(self.metrics)


def _splits(name, *splits):
  return {split: f'{name}/{split}.jsonl' for split in splits}


BENCHMARKS = {
  'bbh': Benchmark(
    3,
    'bbh/cot_fewshot/[!_]*.yaml',
    {'test': 'bbh/{}.jsonl'},
    metrics=(('exact_match', 'get-answer'),),
  ),
  'drop': Benchmark(
    3, 'drop/default.yaml', _splits('drop', 'train', 'validation')
  ),
  'gsm8k': Benchmark(8, 'gsm8k/gsm8k.yaml', _splits('gsm8k', 'train', 'test')),
  'hellaswag': Benchmark(
    10, 'hellaswag/hellaswag.yaml', _splits('hellaswag', 'train', 'validation')
  ),
  'minerva_math': Benchmark(
    4,
    'minerva_math/minerva_math_*.yaml',
    {'test': 'minerva_math/{}.jsonl'},
    ('training_split',),
    (('exact_match', 'none'), ('math_verify', 'none')),
  ),
  'mmlu': Benchmark(
    5,
    'mmlu/default/mmlu_*.yaml',
    {'dev': 'mmlu/{}/dev.jsonl', 'test': 'mmlu/{}/test.jsonl'},
    metrics=(('acc', 'none'),),
  ),
  'piqa': Benchmark(
    0, 'piqa/piqa.yaml', _splits('piqa', 'validation'), ('training_split',)
  ),
  'triviaqa': Benchmark(
    5, 'triviaqa/default.yaml', _splits('triviaqa', 'train', 'validation')
  ),
}


class Local(NamedTuple):
  """Tasks that are defined here, on this machine.

  Attributes:
    folder: where their definitions lie.
    names: those of them that were asked for.
  """

  folder: pathlib.Path
  names: tuple[str, ...]


def shipped() -> pathlib.Path:
  """The folder of lm_eval's tasks, found without importing it.

  Raises:
    ValueError: it is not installed.
  """
  spec = importlib.util.find_spec('lm_eval')
  if spec is None:
    raise ValueError(MISSING)
  return pathlib.Path(spec.submodule_search_locations[0]) / 'tasks'


def prepare(names: Sequence[str], data: str | None, out: str) -> Local:
  """Defines those of `names` that are among the eight, see `local_tasks`.

  Where all are read from local files, libraries that are imported after this do
  not look for a network.

  Args:
    names: tasks.
    data: folder of their files, None for the hub.
    out: folder of the results, in which tasks/ becomes that of definitions.

  Raises:
    ValueError: lm_eval is not installed, or see `local_tasks`.
  """
  folder, data_folder = shipped(), None
  if data is not None:
    data_folder = pathlib.Path(paths.local(data, '--data'))
  out_folder = pathlib.Path(paths.local(out, '--out')) / 'tasks'
  local = local_tasks(names, data_folder, out_folder, folder)
  if data is not None and {*names} == {*local.names}:
    os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
  return local


def local_tasks(
  names: Sequence[str],
  data_folder: pathlib.Path | None,
  out_folder: pathlib.Path,
  shipped_folder: pathlib.Path,
) -> Local:
  """Writes definitions of those tasks of `names` that are among the eight.

  Args:
    names: tasks; others are left to lm_eval and the hub.
    data_folder: holds the files above; None to read the hub.
    out_folder: is made, and filled with one file a task.
    shipped_folder: see `shipped`.

  Raises:
    ValueError: a file of the data, or of lm_eval, does not exist.
  """
  chosen = tuple(name for name in names if name in BENCHMARKS)
  out_folder.mkdir(parents=True, exist_ok=True)
  for name in chosen:
    for task, definition in definitions(name, data_folder, shipped_folder):
      # JSON is YAML.
      text = json.dumps(definition, indent=2)
      (out_folder / f'{task}.yaml').write_text(text)
  return Local(out_folder, chosen)


def definitions(
  name: str, data_folder: pathlib.Path | None, shipped_folder: pathlib.Path
) -> list[tuple[str, dict[str, Any]]]:
  """The tasks of one benchmark, with the group of them where it is one."""
  benchmark = BENCHMARKS[name]
  sources = sorted(shipped_folder.glob(benchmark.pattern))
  if not sources:
    raise ValueError(
      f'lm_eval ships no {shipped_folder / benchmark.pattern}: its version is '
      'not one that this is for, which begins at 0.4.13'
    )
  found = []
  for source in sources:
    task, part = name, ''
    if benchmark.is_group:
      task, part = (_value(source, word) for word in ('task', 'dataset_name'))
      if part == 'default':
        continue  # MATH-500, which is another data set
    found.append(
      (task, _definition(task, part, source, benchmark, data_folder))
    )
  if benchmark.is_group:
    found.append((name, _group(name, [task for task, _ in found])))
  return found


def _definition(task, part, source, benchmark, data_folder):
  definition = {
    'include': str(source.resolve()),
    'task': task,
    'num_fewshot': benchmark.shots,
  }
  if data_folder is None:
    return definition
  files = {
    split: (data_folder / file.format(part)).resolve()
    for split, file in benchmark.files.items()
  }
  for file in files.values():
    if not file.is_file():
      raise ValueError(
        f'{file} does not exist, which the task {task} needs: JSON lines with '
        'the columns of its data set; or leave the task out of --tasks'
      )
  return {
    **definition,
    'dataset_path': 'json',
    'dataset_name': None,
    'dataset_kwargs': {
      'data_files': {split: str(file) for split, file in files.items()}
    },
    **dict.fromkeys(benchmark.unused),
  }


def _group(name, tasks):
  return {
    'group': name,
    'task': tasks,
    'aggregate_metric_list': [
      {
        'metric': metric,
        'aggregation': 'mean',
        'weight_by_size': True,
        'filter_list': chosen,
      }
      for metric, chosen in BENCHMARKS[name].metrics
    ],
    'metadata': {'version': 1.0},
  }


def _value(source, word) -> str:
  """A value at the top of a shipped file, which is a plain string there."""
  pattern = rf'^"?{word}"?:\s*"?([\w-]+)"?\s*$'
  found = re.search(pattern, source.read_text(), re.MULTILINE)
  if found is None:
    raise ValueError(f'{source} has no {word}: its format is not a known one')
  return found[1]
