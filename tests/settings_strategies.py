"""Hypothesis strategies of settings, derived from the types of the settings.

A value is mostly one that the type allows and that a small model can have (near
the default, or small), sometimes one at the ends of the type's range or of
another type. Examples shrink to the first base, the first setting and a
proper value.
"""

import dataclasses
import functools
import pathlib
import typing
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st

from mhc import config as config_lib
from mhc.config import comparison, dicts

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A model that compiles in seconds, and what makes it one with experts, a
# pipeline, or experts that several devices share.
TINY = {
  'num_steps': 40,
  'model.num_blocks': 2,
  'model.dim': 16,
  'model.ffn_dim': 16,
  'model.attention.head_dim': 8,
  'model.attention.rope_dim': 4,
  'model.attention.kv_rank': 8,
  'data.path': str(ROOT / 'mhc' / '*.py'),  # beside it may be bytecode
  'data.seq_len': 8,
  'eval_sequences': 8,
  'final_sequences': 8,
  'mesh.num_devices': 1,
}
EXPERTS = {'model.moe.num_experts': 4, 'model.moe.expert_dim': 8}
PIPE = {
  'mesh.pipe': 2,
  'mesh.num_devices': 2,
  'mesh.schedule': '1f1b',
  'data.microbatch_size': 4,
}
SPLIT = {'mesh.expert': 2, 'mesh.num_devices': 4, 'data.microbatch_size': 2}
# Without it most ablations of the connection are refused.
APART = {'model.connection.expand_scale': 'random'}
# With their shares of the cases: what compiles slowly is seldom.
BASES = (
  *[TINY] * 6,
  *[TINY | APART] * 2,
  *[TINY | {'mesh.num_devices': 0}] * 4,
  *[TINY | EXPERTS] * 2,
  *[TINY | EXPERTS | SPLIT] * 2,
  *[TINY | PIPE] * 3,
  TINY | EXPERTS | PIPE | SPLIT,
)
# A type does not say which strings are meant.
WORDS = {
  'data.path': [str(ROOT / name) for name in ('tests/*.py', 'kernels/*.py')],
  'data.mixture': [f'{ROOT}/tests/*.py=1', f'{ROOT}/kernels/*.py=2', 'a=b'],
  'data.text_field': ['text', 'content'],
  'wandb': [''],
  'start_from': [''],
  'model.connection.kind': config_lib.KINDS,
  'kinds': config_lib.KINDS,
  'title': ['', 'Depth'],
  'tuned_on': ['', 'main', 'rates'],
  'partner': config_lib.KINDS,
  'curve': ['', 'sizes'],
}
# Settings of a panel with a form of their own: some right, most wrong.
STRUCTURED = {
  'axes': [
    {'model.num_blocks': (1, 2)},
    (('model.connection.num_streams', (1, 4)),),
    *({'model': (1,)}, {'x': (1,)}, {'data.path': 'a'}, ((1, 2),), (('a',),)),
    *(3, ('model.dim',), {'model.dim': ()}, {'model.dim': ('x',)}),
  ],
  'designs': [
    {'mine': {'model.connection.kind': 'mhc'}},
    *({'mine': 3}, {'mine': (1,)}, ('mine',), {'mine': {'seed': 'x'}}, None),
  ],
  'settings': [{'optimizer.schedule': 'cosine'}, {'optimizer': 1}, ('a',), 'b'],
  'contrasts': [(('mhc', 'residual'),), ('mhc',), (('mhc', 'mhc'),), 2, ((),)],
  'expected_sd': [((('mhc', 'hc'), 0.01),), (1,), ((('mhc', 'hc'), 'x'),), 1],
  'declared_seeds': [(0, 1), (), ('x',), 0],
}
INTS = (
  *(-1, 0, 257, 10**6, 10**9, 2**31 - 1, 2**31, 2**32, 2**63, 10**20, 10**400),
  -(2**63),
)
FLOATS = (
  *(-0.0, -1.0, 1e-30, 1e-40, 1e-46, 1e-300, 1e6, 1e30, 3.4e38, 3.5e38, 1e300),
  *(10**30, 10**400, 0.9999999, 1 - 1e-12),
  *(float('nan'), float('inf'), -float('inf')),
)
STRINGS = (
  *('/nowhere', '', '*', 'x' * 5000, 'a\nb', '\0', '~', 'gs://bucket/x', '['),
  *('/dev/null', 'mhc/*.py', str(ROOT / 'LICENSE')),
)
OTHERS = (
  *(None, True, False, 0, 1, 3, 2.0, 1.5, '', 'x', 'ten', '3', '1e3', '0.1'),
  *('True', 'none', 'auto', (), (1,), (0.5, 'x'), (0.5, (0.7,)), [], [2], [[]]),
  *({}, {'a': 1}),
)


class Case(NamedTuple):
  """Settings by dotted name: a small model, and what is changed of it."""

  base: dict[str, Any]
  changes: dict[str, Any]


@functools.cache
def hints(cls: type = config_lib.Config) -> dict[str, Any]:
  """Dotted name -> type of every setting of a dataclass."""
  found = {}
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      found |= {f'{name}.{inner}': one for inner, one in hints(hint).items()}
    else:
      found[name] = hint
  return found


def proper(hint, default, words=()) -> st.SearchStrategy:
  """Values that the type allows, most of them in range."""
  if typing.get_origin(hint) is Literal:
    return st.sampled_from(typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    entry = st.one_of(
      [
        proper(typing.get_args(hint)[0], one, words)
        for one in default or (typing.get_args(hint)[0](),)
      ]
    )
    lists = st.lists(entry, max_size=3)
    return (lists | lists.map(sorted)).map(tuple)
  if hint is str:
    return st.sampled_from(words)
  if hint is bool:
    return st.booleans()
  if hint is int:
    near = sorted({default // 2, default, default + 1, 2 * default})
    return st.integers(0, 8) | st.sampled_from(near)
  near = {default, default / 10, default * 10}
  return st.sampled_from(sorted({0.0, 1e-6, 1e-3, 0.5, 1.0, 2.0} | near))


def improper(hint, default, words=()) -> st.SearchStrategy:
  """Values at the ends of the type's range, or of another type."""
  others = st.sampled_from(OTHERS)
  if typing.get_origin(hint) is Literal:
    known = st.sampled_from(typing.get_args(hint))
    ways = str.upper, lambda word: word[:-1], lambda word: f' {word}'
    return st.one_of(
      others, st.just(typing.get_args(hint)), *map(known.map, ways)
    )
  if typing.get_origin(hint) is tuple:
    entry = typing.get_args(hint)[0]
    first = default[0] if default else entry()
    entries = proper(entry, first, words) | improper(entry, first)
    lists = st.lists(entries, min_size=1, max_size=3)
    return others | lists | lists.map(tuple) | entries
  edges = {
    bool: others,
    int: st.sampled_from(INTS) | st.integers(),
    float: st.sampled_from(FLOATS) | st.floats(),
    str: st.sampled_from(STRINGS) | st.text(),
  }
  return edges[hint] | others


@st.composite
def misspelt(draw, name: str) -> str:
  place = draw(st.integers(0, len(name) - 1))
  return draw(
    st.sampled_from(
      (
        name[:place] + name[place + 1 :],
        name[:place] + 'x' + name[place:],
        name.upper(),
        name.rpartition('.')[2],
        f'{name}.{name}',
        f'model.{name}',
        '',
      )
    )
  )


@functools.cache
def _change(cls, name) -> st.SearchStrategy[tuple[str, Any]]:
  """(the name of a setting, a value for it)."""
  what = hints(cls)[name], dicts.leaves(cls())[name], WORDS.get(name, ())
  good = st.tuples(st.just(name), proper(*what))
  bad = st.tuples(st.just(name), improper(*what))
  unknown = st.tuples(misspelt(name), proper(*what) | improper(*what))
  shares = [good] * 38 + [bad] * 11 + [unknown]
  return st.sampled_from(shares).flatmap(lambda strategy: strategy)


@st.composite
def _changes(draw, cls, names) -> dict[str, Any]:
  one = st.sampled_from(names).flatmap(functools.partial(_change, cls))
  least = draw(st.integers(1, 3))
  return dict(
    draw(
      st.lists(one, min_size=least, max_size=4, unique_by=lambda pair: pair[0])
    )
  )


@st.composite
def cases(draw) -> Case:
  """One of `BASES` with up to four changes, in two sections or anywhere."""
  names = [*hints()]
  sections = {name.rpartition('.')[0] for name in names}
  section = st.sampled_from(sorted(sections))
  together = draw(st.none() | st.tuples(section, section))
  if together:
    names = [name for name in names if name.rpartition('.')[0] in together]
  base = draw(st.sampled_from(BASES))
  return Case(base, draw(_changes(config_lib.Config, tuple(names))))


@st.composite
def comparisons(draw) -> tuple[dict[str, Any], dict[str, Any]]:
  """Changes of a panel, and of the settings of its base run if not empty."""
  simple = [n for n in hints(comparison.Panel) if n not in STRUCTURED]
  panel = draw(_changes(comparison.Panel, tuple(simple)))
  for name in draw(st.lists(st.sampled_from([*STRUCTURED]), max_size=1)):
    panel[name] = draw(st.sampled_from(STRUCTURED[name]))
  return panel, draw(
    st.just({}) | st.just({}) | cases().map(lambda c: c.changes)
  )
