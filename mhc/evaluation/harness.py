"""A scorer as a model of EleutherAI's lm-evaluation-harness (`lm_eval`).

Texts become tokens by the run's vocabulary and the start token stands before
each, as before a document in training. `lm_eval` is an extra: without it this
module is a ValueError that says so.
"""

from collections.abc import Sequence
from typing import Any

from mhc.evaluation import scoring
from mhc.evaluation import tasks as tasks_lib

try:
  import lm_eval
  from lm_eval import tasks as lm_tasks
  from lm_eval.api import model as lm_model
except ImportError:
  raise ValueError(tasks_lib.MISSING) from None

# Of a task that names no number, as for the harness's own models.
MAX_TOKENS = 256
NAMES = ('max_gen_toks', 'max_new_tokens', 'max_tokens')
KNOWN = (*NAMES, 'until', 'do_sample', 'temperature', 'top_p')


class HarnessModel(lm_model.TemplateLM):
  """What the harness asks of a model, answered by a `Scorer`."""

  def __init__(self, scorer: scoring.Scorer):
    super().__init__()
    self._scorer = scorer

  @property
  def eot_token_id(self) -> int:
    return int(self._scorer.tokenizer.stop)

  @property
  def prefix_token_id(self) -> int:
    return int(self._scorer.tokenizer.start)

  @property
  def max_length(self) -> int:
    return self._scorer.max_length

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_
  ) -> list[int]:
    """The tokens of a text without marks, whatever is said of special ones."""
    return self._scorer.tokenizer.encode(string.encode()).tolist()

  def _encode_pair(self, context, continuation):
    first, second = super()._encode_pair(context, continuation)
    return [self.prefix_token_id, *first], second

  def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
    found = self._scorer.log_likelihoods(
      [(context, continuation) for _, context, continuation in requests]
    )
    for (texts, *_), answer in zip(requests, found, strict=True):
      self.cache_hook.add_partial('loglikelihood', texts, answer)
    return found

  def loglikelihood_rolling(
    self, requests, disable_tqdm: bool = False
  ) -> list[float]:
    texts = [self.tok_encode(request.args[0]) for request in requests]
    return self._scorer.rolling(texts)

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Continuations; the requests of a task ask for the same and go together.

    Raises:
      ValueError: a task asks for a way of sampling that there is not.
    """
    groups = {}
    for number, request in enumerate(requests):
      key = repr(sorted(request.args[1].items()))
      groups.setdefault(key, []).append(number)
    found = [''] * len(requests)
    for numbers in groups.values():
      contexts = [
        [self.prefix_token_id, *self.tok_encode(requests[number].args[0])]
        for number in numbers
      ]
      until, options = generation(requests[numbers[0]].args[1])
      texts = self._scorer.generate(contexts, until, **options)
      for number, text in zip(numbers, texts, strict=True):
        found[number] = text
        self.cache_hook.add_partial(
          'generate_until', requests[number].args, text
        )
    return found


def generation(asked: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
  """Stop strings and arguments of `Scorer.generate` for a task's settings."""
  sampled = asked.get('do_sample', asked.get('temperature', 0) > 0)
  if sampled and (unknown := asked.keys() - {*KNOWN}):
    name = min(unknown)
    raise ValueError(
      f'a task asks for {name}={asked[name]} in its generation_kwargs: there '
      f'are {", ".join(KNOWN)}'
    )
  until = asked.get('until') or []
  given = [asked[name] for name in NAMES if asked.get(name) is not None]
  options = {'max_tokens': int(given[0]) if given else MAX_TOKENS}
  if sampled:
    options['temperature'] = float(asked.get('temperature', 1.0))
    options['top_p'] = float(asked.get('top_p', 1.0))
  return [until] if isinstance(until, str) else [*until], options


def evaluate(
  scorer: scoring.Scorer,
  names: Sequence[str],
  local: tasks_lib.Local,
  limit: int | None = None,
) -> dict[str, Any]:
  """Runs tasks; returns what the harness does, every sample included.

  Args:
    scorer: of the run.
    names: tasks or groups of tasks.
    local: definitions that stand before lm_eval's own, see `local_tasks`.
    limit: documents a task, None for all.

  Raises:
    ValueError: there is no such task.
  """
  manager = lm_tasks.TaskManager(
    include_path=str(local.folder),
    include_defaults=bool({*names} - {*local.names}),
  )
  for name in names:
    if name not in manager.all_tasks:
      raise ValueError(
        f'--tasks={name} is no task of lm_eval, see `lm_eval ls`'
      )
  return lm_eval.simple_evaluate(
    HarnessModel(scorer), tasks=[*names], task_manager=manager, limit=limit
  )
