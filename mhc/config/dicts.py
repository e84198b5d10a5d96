"""Conversion of settings to and from nested dicts, and changes to them.

`from_dict` raises for unknown names and values of the wrong type.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from mhc.config import aliases, checks


def to_dict(config) -> Any:
  """Converts settings to nested dicts of plain values; tuples stay tuples."""
  if dataclasses.is_dataclass(config):
    return {
      field.name: to_dict(getattr(config, field.name))
      for field in dataclasses.fields(config)
    }
  if isinstance(config, Mapping):
    return {key: to_dict(value) for key, value in config.items()}
  return config


def from_dict[T](cls: type[T], values: Mapping[str, Any], path: str = '') -> T:
  """Builds `cls` from a nested dict, the inverse of `to_dict`.

  Raises:
    ValueError: an unknown name (with the nearest known one), a value of the
      wrong type or out of its range.
  """
  hints = typing.get_type_hints(cls)
  arguments = {}
  for name, value in values.items():
    name, value = aliases.current(path + name, value)
    name = name.removeprefix(path)
    if name not in hints:
      raise ValueError(
        checks.unknown_name(path + name, [path + h for h in hints])
      )
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
      value = from_dict(hint, _mapping(path + name, value), f'{path}{name}.')
    elif typing.get_origin(hint) is Mapping:
      entry = typing.get_args(hint)[1]
      value = types.MappingProxyType(
        {
          key: from_dict(entry, _mapping(name, item), f'{path}{name}.{key}.')
          for key, item in _mapping(path + name, value).items()
        }
      )
    elif typing.get_origin(hint) is tuple and isinstance(value, list):
      value = tuple(value)
    arguments[name] = value
  return cls(**arguments)


def leaves(config, path: str = '') -> dict[str, Any]:
  """Maps the dotted name of every setting to its value."""
  flat = {}
  for name, value in to_dict(config).items():
    if isinstance(value, dict):
      flat |= leaves(value, f'{path}{name}.')
    else:
      flat[path + name] = value
  return flat


def replace(config, **changes):
  """`dataclasses.replace`, in which a dict holds changes one level down."""
  return dataclasses.replace(
    config,
    **{
      name: replace(getattr(config, name), **value)
      if isinstance(value, dict)
      else value
      for name, value in changes.items()
    },
  )


def override[T](config: T, changes: Mapping[str, Any]) -> T:
  """Changes settings by their dotted names, checked as a whole.

  Raises:
    ValueError: an unknown name, or a value that does not fit.
  """
  values = to_dict(config)
  for name, value in changes.items():
    *groups, last = name.split('.')
    group = values
    for one in groups:
      group = group.get(one) if isinstance(group, dict) else None
    if not isinstance(group, dict) or last not in group:
      raise ValueError(checks.unknown_name(name, list(leaves(config))))
    if isinstance(group[last], dict):
      raise ValueError(
        f'{name}={value!r}: {name} is a group of settings, name one of them'
      )
    group[last] = value
  return from_dict(type(config), values)


def _mapping(name, value):
  if not isinstance(value, Mapping):
    raise ValueError(f'{name}={value!r} must be a group of settings')
  return value
