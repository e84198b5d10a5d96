"""Held-out loss, in nats a token and in bits per byte of text."""

import collections
import dataclasses
import math

import jax
import numpy as np

from mhc import config as config_lib
from mhc.config import task as task_lib
from mhc.data import batches
from mhc.data import mixture as mixture_lib
from mhc.data import questions
from mhc.data import tokenizer as tokenizer_lib
from mhc.parallel import partition
from mhc.runtime import paths
from mhc.training import checkpoint
from mhc.training import state as state_lib
from mhc.training import step as step_lib
from mhc.training import vocabulary
from mhc.training import workdir as workdir_lib

# Rows are scored in batches this many times the training batch.
BATCHES = 4


def row_nats(
  step: step_lib.Step,
  state: state_lib.TrainState,
  rows: np.ndarray,
  batch_size: int,
) -> np.ndarray:
  """The summed nats of the t targets of each of `rows`, int32 [r, t + 1].

  `batch_size` is the training batch, whose multiples the devices divide.
  """
  return _by_batches(step.token_losses, step.mesh, state, rows, batch_size)


def right_answers(
  step: step_lib.Step,
  state: state_lib.TrainState,
  rows: np.ndarray,
  config: config_lib.DataConfig,
) -> dict[str, float]:
  """The share of questions of each level whose answer is the likeliest text.

  That is, of whose bytes each has the largest logit after the right ones. Text
  asks no questions: then there is none.
  """
  if not config.task.name:
    return {}
  found = _by_batches(
    step.are_likeliest, step.mesh, state, rows, config.batch_size
  )
  shares = collections.defaultdict(list)
  for level, targets in questions.levels(config.task):
    shares[level].append(found[:, targets].min(axis=1))
  return {
    f'{task_lib.ACCURACY}/{level}': float(np.mean(right))
    for level, right in shares.items()
  }


def _by_batches(program, mesh, state, rows, batch_size):
  """What a program of a state and tokens gives for each row."""
  found, size = [], BATCHES * batch_size
  for start in range(0, len(rows), size):
    batch = rows[start : start + size]
    missing = size - len(batch)
    padded = np.pad(batch, ((0, missing), (0, 0)))
    tokens = partition.put(padded, mesh, partition.BATCH)
    found.append(jax.device_get(program(state, tokens))[: len(batch)])
  return np.concatenate(found)


def losses(
  nats: np.ndarray,
  rows: np.ndarray,
  tokenizer: tokenizer_lib.Tokenizer | None,
) -> dict[str, float]:
  """Held-out loss from the `row_nats` of `rows`.

  Bits per byte are all nats, those of document marks included, over the number
  of target bytes: comparable between tokenizers, nan without a known one. The
  targets of a task are the bytes of its answers alone.
  """
  targets, total = rows[:, 1:], float(nats.sum(dtype=np.float64))
  targets = targets[targets >= 0]
  bits = math.nan
  if tokenizer is not None:
    bits = total / math.log(2) / tokenizer.num_bytes(targets)
  return {
    'loss/heldout': total / targets.size,
    'loss/heldout_bits_per_byte': bits,
  }


def evaluate_checkpoint(
  workdir: paths.Path,
  path: str | None,
  num_rows: int,
  given: str | None = None,
) -> dict[str, float | int | str]:
  """Scores the newest checkpoint of the run in `workdir`.

  Args:
    workdir: the work directory of the run.
    path: text to score, None for the run's own; its held-out side is used, by
      the vocabulary of the run.
    num_rows: rows to score, 0 for all.
    given: the vocabulary of a run whose own is unknown.

  Raises:
    ValueError, OSError: there is no run or no checkpoint, unusable text, or
      tokens of another vocabulary.
  """
  config = workdir_lib.read_config(workdir)
  tokenizer = vocabulary.of(workdir, given)
  if path is not None:
    config = dataclasses.replace(
      config,
      data=dataclasses.replace(
        config.data, path=path, mixture=(), task=config_lib.TaskConfig()
      ),
    )
  mixture = mixture_lib.load(config, tokenizer)
  if tokenizer is None and mixture.tokenizer is not None:
    vocabulary.required(workdir)
  rows, _ = batches.heldout_rows(
    mixture, config.data, num_rows or None, config.model.vocab_size
  )
  step = step_lib.build(config)
  abstract = step.saved_state._replace(opt_state=None)
  state = step.to_pipeline_order(checkpoint.restore(workdir, abstract))
  nats = row_nats(step, state, rows, config.data.batch_size)
  return {
    'step': int(state.step),
    **losses(nats, rows, tokenizer or mixture.tokenizer),
    **right_answers(step, state, rows, config.data),
    'rows': len(rows),
    'corpus': ', '.join(corpus.name for corpus in mixture.corpora),
    'corpus_sha256': mixture.sha256,
  }
