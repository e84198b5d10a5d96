"""The marks around a document, as a tokenizer.json has them.

They are those that its post-processor puts around a text; else the first of
`START` and of `STOP` that it has. One that says what follows a text also says
what precedes it, so nothing precedes it if it does not say so.
"""

import itertools
from typing import Any

TRAINED = ('<|start|>', '<|stop|>')
_BAR = '\N{FULLWIDTH VERTICAL LINE}'
# Names that published vocabularies give to them.
START = (
  TRAINED[0],
  '<|begin_of_text|>',
  '<|startoftext|>',
  f'<{_BAR}begin▁of▁sentence{_BAR}>',
  '<s>',
  '<bos>',
)
STOP = (
  TRAINED[1],
  '<|endoftext|>',
  '<|end_of_text|>',
  f'<{_BAR}end▁of▁sentence{_BAR}>',
  '</s>',
  '<eos>',
)


def numbers(vocabulary: dict[str, Any]) -> dict[str, int]:
  """Numbers of the added tokens that stand for no text, by their names."""
  return {
    token['content']: token['id']
    for token in vocabulary['added_tokens']
    if token['special'] or token['content'] in (*START, *STOP)
  }


def own(vocabulary: dict[str, Any]) -> tuple[str, str]:
  """The names of the marks before and after a document, '' for none."""
  known = numbers(vocabulary)
  before, after = _around(vocabulary.get('post_processor'))
  starts = [*before, *(() if after else START)]
  stops = [*after, *STOP]
  return (
    next((name for name in starts if name in known), ''),
    next((name for name in stops if name in known), ''),
  )


def replaced(
  vocabulary: dict[str, Any], start: str | None, stop: str | None
) -> dict[str, Any]:
  """The vocabulary with other marks, None for its own, '' for none before.

  They become its post-processor.

  Raises:
    ValueError: it has no such token, or none to put after a document.
  """
  own_start, own_stop = own(vocabulary)
  start = own_start if start is None else start
  stop = own_stop if stop is None else stop
  added = {token['content']: token for token in vocabulary['added_tokens']}
  for name in [start, stop] if start else [stop]:
    if name not in added:
      raise ValueError(
        f'has no token {name!r} to mark documents with, only '
        f'{", ".join(list(added)[:20])}'
      )
    added[name] = {**added[name], 'special': True}
  text, other = ({'Sequence': {'id': name, 'type_id': 0}} for name in 'AB')
  names = [name for name in (start, stop) if name]
  around = [{'SpecialToken': {'id': name, 'type_id': 0}} for name in names]
  return {
    **vocabulary,
    'added_tokens': list(added.values()),
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': [*around[:-1], text, around[-1]],
      'pair': [text, other],
      'special_tokens': {
        name: {'id': name, 'ids': [added[name]['id']], 'tokens': [name]}
        for name in names
      },
    },
  }


def _around(post_processor) -> tuple[list[str], list[str]]:
  """The names that a post-processor puts before and after a text."""
  match post_processor:
    case {'type': 'Sequence', 'processors': [*inner]}:
      before, after = zip(([], []), *map(_around, inner), strict=True)
      return [*itertools.chain(*before)], [*itertools.chain(*after)]
    case {'type': 'TemplateProcessing', 'single': [*pieces]}:
      names = [
        piece['SpecialToken']['id'] if 'SpecialToken' in piece else None
        for piece in pieces
      ]
      text = names.index(None) if None in names else len(names)
      return names[:text], [name for name in names[text:] if name]
    case {'cls': [str(before), *_], 'sep': [str(after), *_]}:
      return [before], [after]
  return [], []
