"""Tasks: their rows, what of them is predicted, and a run on one."""

import dataclasses
import itertools
import re

from example_configs import TINY_RUN
import jax
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.config import dicts
from mhc.config import task as task_lib
from mhc.data import batches
from mhc.data import mixture
from mhc.data import questions
from mhc.training import evaluate
from mhc.training import run
from mhc.training import step

TASKS = [
  *(config_lib.TaskConfig(name) for name in task_lib.TASKS),
  config_lib.TaskConfig('hops', (1, 8), 9, 3),
  config_lib.TaskConfig('permutations', (1, 3), 5, 1),
  config_lib.TaskConfig('brackets', (3,), 4, 5),
  config_lib.TaskConfig('copy', (1, 2, 7), 64, 2),
  config_lib.TaskConfig('recall', (1, 2), 2, 3),
]


def asked(task, index=0, side='train'):
  rng = np.random.default_rng((questions.SIDES[side], index))
  return list(questions.questions(task, rng))


@pytest.mark.parametrize('task', TASKS, ids=str)
def test_a_row_is_its_questions_and_what_settings_say_of_it(task):
  found = asked(task, 7)
  text = b''.join(one.prompt + one.answer for one in found)
  assert len(text) == task.num_bytes
  answers = b''.join(one.answer for one in found)
  assert len(answers) == task.num_answer_bytes
  size = len(text) + 3
  row = questions.Rows(task, 'train', size)[7 * size : 8 * size + 1]
  inputs = np.where(row < 0, ~row, row)
  assert inputs.astype(np.uint8).tobytes() == b'\n' + text + b'\n\n\n'
  assert row[row >= 0].astype(np.uint8).tobytes() == answers
  targets = row[1:]
  for question, (level, place) in zip(
    found, questions.levels(task), strict=True
  ):
    assert question.level == level
    assert targets[place].astype(np.uint8).tobytes() == question.answer
  counts = [one.level for one in found]
  each = {level: counts.count(level) for level in task.ladder}
  per_level = {n if task.name != 'recall' else n / m for m, n in each.items()}
  assert per_level == {task.repeats}


def solved(task, text: str) -> str:
  """The answers of a row's text, by other means than those that made it."""
  if task.name == 'hops':
    pairs, rest = text[: 2 * task.symbols], text[2 * task.symbols :]
    leads = dict(itertools.batched(pairs, 2))
    answer = ''
    for level, here, _ in itertools.batched(rest, 3):
      for _ in range(int(level)):
        here = leads[here]
      answer += here
    return answer
  answer = ''
  for line in text.split('\n'):
    before, _, after = line.partition(' ')
    if task.name == 'permutations':
      elements = [*itertools.permutations(range(task.symbols))]
      state = [*range(task.symbols)]
      for letter in before:
        element = elements[ord(letter) - questions.FIRST_ELEMENT]
        state = [element[i] for i in state]
      answer += chr(questions.FIRST_ELEMENT + elements.index(tuple(state)))
    if task.name == 'brackets':
      while (shorter := re.sub(r'\(\)|\[\]|{}|<>', '', before)) != before:
        before = shorter
      answer += before[::-1].translate(str.maketrans('([{<', ')]}>'))
    if task.name == 'copy':
      answer += before
    if task.name == 'recall':
      values = dict(itertools.batched(before, 2))
      answer += ''.join(values[key] for key in after[::2])
  return answer


@pytest.mark.parametrize('task', TASKS, ids=str)
def test_answers_are_right(task):
  for index in range(30):
    found = asked(task, index)
    text = b''.join(one.prompt + one.answer for one in found)
    answers = b''.join(one.answer for one in found)
    assert solved(task, text.decode('latin1')) == answers.decode('latin1')


def test_rows_are_functions_of_side_and_number():
  task = config_lib.TaskConfig('hops')
  train, heldout = (questions.Rows(task, side, 90) for side in questions.SIDES)
  np.testing.assert_array_equal(train[90:181], train[0:271][90:181])
  seen = {rows.row(i).tobytes() for rows in (train, heldout) for i in range(50)}
  assert len(seen) == 100
  # Half of the guesses of two symbols are right.
  task = config_lib.TaskConfig('brackets', (1,), 2)
  kinds = [asked(task, i)[0].answer for i in range(400)]
  assert abs(kinds.count(b')') / 400 - task.chance(1)) < 0.1


def test_batches_resume_and_differ_by_seed():
  task = config_lib.TaskConfig('copy', (2, 3))
  data = config_lib.DataConfig(task=task, seq_len=20, batch_size=3)
  found = mixture.load(config_lib.Config(data=data))
  assert found.corpora[0].line().startswith('copy: rows of 13 bytes, 5 of them')
  one = batches.train_batches(found, data, 0, 320)
  first = [next(one) for _ in range(5)]
  again = batches.train_batches(found, data, 0, 320)
  again.set_state({'next_index': 3})
  np.testing.assert_array_equal(next(again), first[3])
  other = next(batches.train_batches(found, data, 1, 320))
  assert not np.array_equal(other, first[0])
  heldout, _ = batches.heldout_rows(found, data, 6, 320)
  assert heldout.shape == (6, 21)
  assert np.sum(heldout[:, 1:] >= 0) == 6 * data.targets_per_row


def settings(**mesh):
  return dicts.override(
    dataclasses.replace(TINY_RUN, mesh=config_lib.MeshConfig(**mesh)),
    {
      'data.task.name': 'recall',
      'data.task.levels': (1, 2),
      'data.task.size': 4,
      'data.seq_len': 24,
      'data.batch_size': 4,
      'model.num_blocks': 2,
      'model.connection.kind': 'residual',
    },
  )


def test_other_bytes_change_neither_loss_nor_gradient():
  """What is not predicted is read all the same; the loss is a mean of answers.

  And it is that of the network's own logits.
  """
  config = settings(num_devices=1)
  programs = step.build(config)
  state = programs.init(0)
  rows, _ = batches.heldout_rows(
    mixture.load(config), config.data, 4, config.model.vocab_size
  )
  nats = evaluate.row_nats(programs, state, rows, 4)
  model = programs.placement.merge(state.params)
  tokens = np.where(rows < 0, ~rows, rows)
  logits, _ = model.logits_and_stats(jax.numpy.asarray(tokens[:, :-1]))
  log_p = np.asarray(jax.nn.log_softmax(logits))
  scored = rows[:, 1:] >= 0
  own = np.take_along_axis(log_p, tokens[:, 1:, None], 2)[..., 0]
  np.testing.assert_allclose(nats, -np.sum(own * scored, axis=1), rtol=1e-5)
  found = evaluate.losses(nats, rows, None)
  assert config.data.targets_per_row == scored[0].sum() == 3
  np.testing.assert_allclose(
    found['loss/heldout'], -own[scored].mean(), rtol=1e-5
  )
  right = evaluate.right_answers(programs, state, rows, config.data)
  hits = log_p.argmax(-1) == rows[:, 1:]
  assert right == {
    f'accuracy/{level}': np.mean(
      [
        hits[:, place]
        for at, place in questions.levels(config.data.task)
        if at == level
      ]
    )
    for level in (1, 2)
  }


@pytest.mark.parametrize(
  'head', ['vocab', pytest.param('last', marks=pytest.mark.slow)]
)
def test_a_pipeline_scores_them_alike(head):
  config = settings(num_devices=1)
  rows, _ = batches.heldout_rows(
    mixture.load(config), config.data, 16, config.model.vocab_size
  )
  found = []
  for mesh in (
    dict(num_devices=1),
    dict(num_devices=2, pipe=2, chunks=2, schedule='1f1b', head=head),
  ):
    here = settings(**mesh)
    here = dataclasses.replace(
      here, data=dataclasses.replace(here.data, microbatch_size=2)
    )
    programs = step.build(here)
    state = programs.init(0)
    found.append(
      (
        evaluate.row_nats(programs, state, rows, 4),
        evaluate.right_answers(programs, state, rows, here.data),
      )
    )
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
  assert found[0][1] == found[1][1]


def test_a_run_learns_to_copy(tmp_path, optax_promotion):
  """One letter of two, which a network without depth learns."""
  config = dicts.override(
    settings(num_devices=1),
    {
      'data.task.name': 'copy',
      'data.task.levels': (1,),
      'data.task.size': 2,
      'data.task.questions': 4,
      'num_steps': 60,
      'optimizer.learning_rate': 3e-2,
      'eval_every': 30,
    },
  )
  summary = run.train(config, tmp_path, None)
  assert summary['heldout_nats'] < 0.1
  found = evaluate.evaluate_checkpoint(tmp_path, None, 64)
  assert found['accuracy/1'] > 0.95
  assert found['corpus'] == 'copy'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'task.name': 'hop'}, r"task.name='hop'.*'hops'"),
    ({'task.levels': (1,)}, r"task.levels=\(1,\) would not be used.*name=''"),
    (
      {'task.name': 'hops', 'task.levels': (2, 1)},
      r'task.levels=\(2, 1\) of task.name=.hops. must rise within \[1, 9\]',
    ),
    (
      {'task.name': 'hops', 'task.levels': (4,), 'task.size': 4},
      r'\[1, 3\] with task.size=4',
    ),
    ({'task.name': 'recall', 'task.size': 5}, r'\[1, 5\] with task.size=5'),
    ({'task.name': 'permutations', 'task.size': 6}, r'task.size=6.*\[2, 5\]'),
    ({'task.name': 'copy', 'task.questions': -1}, r'task.questions=-1'),
    ({'task.name': 'copy', 'path': 'x.txt'}, r"'copy' and text.*'x.txt'"),
    (
      {'task.name': 'hops', 'seq_len': 80},
      r'data.seq_len=80 is too short for the 80 bytes.*81 or more',
    ),
  ],
)
def test_settings_that_do_not_fit(changes, message):
  with pytest.raises(ValueError, match=message):
    dicts.override(
      config_lib.Config(),
      {f'data.{name}': value for name, value in changes.items()},
    )
