"""Checks of a settings dataclass; messages name the setting and its value."""

from collections.abc import Iterable
import dataclasses
import difflib
import functools
import re
import typing
from typing import Any, Literal

# Devices count in int32 and compute in float32: the largest number of each, and
# the smallest positive one that is not flushed to 0.
MOST = 2**31 - 1
LARGEST, SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126
# Names in a message.
SHOWN = 8


def unknown_name(name: str, known: list[str]) -> str:
  """Returns the message for a setting that does not exist."""
  near = nearest(name, known)
  if near is None:
    *groups, _ = name.split('.')
    inside = '.'.join((*groups, ''))
    known = [one for one in known if one.startswith(inside)] or known
    more = ', ...' if len(known) > SHOWN else ''
    return (
      f'unknown setting {name!r}; there are {", ".join(known[:SHOWN])}{more}'
    )
  return f'unknown setting {name!r}; did you mean {near!r}?'


def nearest(name: str, known: Iterable[str]) -> str | None:
  """Returns what was probably meant: few letters differ, or it is a part."""
  as_known = {one.lower(): one for one in known}
  found = difflib.get_close_matches(name.lower(), as_known, n=3, cutoff=0.6)
  for one in found:
    if abs(len(one) - len(name)) <= max(2, len(name) // 6):
      return as_known[one]
  inside = [one for one in as_known if name.lower() in one]
  return as_known[inside[0]] if len(inside) == 1 and len(name) > 3 else None


def _section(config) -> str:
  """Returns 'rope_scaling.' for a RopeScalingConfig, '' for a Config."""
  name = type(config).__name__.removesuffix('Config')
  snake = re.sub('(?<=[a-z]{2})(?=[A-Z])', '_', name).lower()
  return snake + '.' * bool(snake)


_hints = functools.cache(typing.get_type_hints)


def check_types(config):
  """Checks the type of every field; an int passes for a float."""
  for name, hint in _hints(type(config)).items():
    value = getattr(config, name)
    where = _section(config) + name
    if typing.get_origin(hint) is Literal:
      one_of(where, value, typing.get_args(hint))
    elif typing.get_origin(hint) is tuple:
      entry = typing.get_args(hint)[0]
      if not isinstance(value, tuple):
        raise ValueError(f'{where}={value!r} must be a tuple')
      if entry is not Any and typing.get_origin(entry) is not tuple:
        value = tuple(_converted(where, item, entry) for item in value)
      object.__setattr__(config, name, value)
    else:
      object.__setattr__(config, name, _converted(where, value, hint))


def _converted(where, value, hint):
  if not isinstance(value, (int, float) if hint is float else hint) or (
    isinstance(value, bool) and hint is not bool
  ):
    raise ValueError(f'{where}={value!r} must be of type {hint.__name__}')
  if hint is float:
    if not abs(value) <= LARGEST:  # nor is nan
      raise ValueError(f'{where}={value} must be finite in float32')
    return float(value)
  if hint is int and abs(value) > MOST:
    raise ValueError(f'{where}={value} must be an integer of 32 bits')
  return value


def one_of(where, value, choices):
  if value not in choices:
    near = nearest(str(value), map(str, choices))
    hint = f'; did you mean {near!r}?' if near else ''
    raise ValueError(f'{where}={value!r} must be one of {choices}{hint}')


def is_name(where, name):
  """Checks that a name can be a folder's, below the one that is meant."""
  if not re.fullmatch(r'\w[\w.+=-]*', name) or len(name.encode()) > 200:
    raise ValueError(
      f'{where}: {name!r} becomes the name of a folder: give it at most 200 '
      'letters, digits and _ . + = -, the first a letter, digit or _'
    )


def at_least(config, **bounds):
  for name, bound in bounds.items():
    if getattr(config, name) < bound:
      raise ValueError(
        f'{_section(config)}{name}={getattr(config, name)} must be at least '
        f'{bound}'
      )


def are_default(config, why, used):
  """Checks that settings without effect have their defaults."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name not in used and value != field.default:
      raise ValueError(
        f'{_section(config)}{field.name}={value!r} would not be used with '
        f'{why}: leave {field.name}={field.default!r}'
      )


def positive(config, *names):
  for name in names:
    if (value := getattr(config, name)) < SMALLEST:
      why = 'must be positive' if value <= 0 else 'is 0 in float32'
      raise ValueError(f'{_section(config)}{name}={value} {why}')


def not_negative(config, *names):
  for name in names:
    if getattr(config, name) < 0:
      raise ValueError(
        f'{_section(config)}{name}={getattr(config, name)} must not be negative'
      )
