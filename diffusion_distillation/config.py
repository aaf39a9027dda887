"""The building blocks of configs: keys and their ranges, declared next to the code that they configure.

A section is a frozen dataclass whose fields are created by `key`. A subclass that only gives a field another default keeps
the key's meaning and range.
"""

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict as Config
from ml_collections import config_dict

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError


class Range(NamedTuple):
  """The range of a number.

  Attributes:
    says: the range in words, which follow 'must be'.
    holds: tells whether a number is in the range.
  """

  says: str
  holds: Callable[[float], bool]


POSITIVE = Range('positive', lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Range('zero or more, and below 2^31', lambda v: 0 <= v < 2**31)
FRACTION = Range('in [0, 1)', lambda v: 0 <= v < 1)
SHARE = Range('in [0, 1]', lambda v: 0 <= v <= 1)
AT_LEAST_TWO = Range('at least 2', lambda v: v >= 2)
AT_LEAST_THREE = Range('at least 3', lambda v: v >= 3)


class Key(NamedTuple):
  """The description of a key, apart from its type and its default.

  Attributes:
    meaning: one or two sentences for the user.
    valid: the range of the number, or of each number of a tuple; None if the code that reads it checks the value.
    choices: all possible values, or those of each entry of a tuple; empty if there is no such list. This list is only
      shown to the user; the code that reads the key rejects other values.
    distinct: whether all entries of the tuple must be different.
    path: 'disk' for a path on this machine, 'any' for a path that may also be a URL, '' for other values.
  """

  meaning: str
  valid: Range | None
  choices: tuple[str, ...]
  distinct: bool
  path: str


def key(
  default: Any,
  meaning: str,
  valid: Range | None = None,
  *,
  choices: Iterable[str] = (),
  distinct: bool = False,
  path: str = '',
) -> Any:
  """Declares a field of a section; see `Key` for the arguments."""
  metadata = {'key': Key(meaning, valid, tuple(choices), distinct, path)}
  return dataclasses.field(default=default, metadata=metadata)


def keys(section: type) -> dict[str, Key]:
  """Returns the keys of a section, by name."""
  return {field.name: _find(section, field.name) for field in dataclasses.fields(section)}


def _find(section: type, name: str) -> Key:
  """Returns a key as the section declares it, or else its nearest base class."""
  for cls in section.__mro__:
    field = getattr(cls, '__dataclass_fields__', {}).get(name)
    if field is not None and 'key' in field.metadata:
      found: Key = field.metadata['key']
      return found
  raise TypeError(f'{section.__name__}.{name} must be declared with key()')


def section(cls: type) -> Config:
  """Returns the defaults of a section; a key whose default is None accepts values of its type."""
  made, defaults = Config(), cls()
  for field in dataclasses.fields(cls):
    value = getattr(defaults, field.name)
    if value is None:
      kind, _ = _not_optional(field.type)
      value = config_dict.placeholder(typing.get_origin(kind) or kind)
    made[field.name] = value
  return made


def joined(*sections: type) -> type:
  """Joins sections to one; if several have a key of the same name, the first one's is used."""
  fields: dict[str, tuple[str, Any, Any]] = {}
  for cls in sections:
    declared = keys(cls)
    for field in dataclasses.fields(cls):
      made = dataclasses.field(default=field.default, metadata={'key': declared[field.name]})
      fields.setdefault(field.name, (field.name, field.type, made))
  namespace = {'__doc__': sections[0].__doc__}
  return dataclasses.make_dataclass('Joined', fields.values(), frozen=True, namespace=namespace)


def optional(cls: type, meaning: str) -> type:
  """Returns a section with the same keys, all of them optional; `meaning` becomes its docstring."""
  fields = []
  for field in dataclasses.fields(cls):
    made = dataclasses.field(default=None, metadata={'key': keys(cls)[field.name]})
    fields.append((field.name, typing.Optional[field.type], made))  # noqa: UP045
  return dataclasses.make_dataclass('Optional', fields, frozen=True, namespace={'__doc__': meaning})


SECTIONS: dict[str, type] = {}  # by name, '' for keys at the top level; configs/default.py fills it


def default_config() -> Config:
  """Returns the defaults of all SECTIONS, locked so that a mistyped key is an error."""
  made = section(SECTIONS[''])
  for name, cls in SECTIONS.items():
    if name:
      made[name] = section(cls)
  return made.lock()


def all_keys() -> dict[str, Key]:
  """Returns the keys of all SECTIONS by their full names, such as 'train.batch_size'."""
  return {_full(name, k): found for name, cls in SECTIONS.items() for k, found in keys(cls).items()}


def _full(section_name: str, name: str) -> str:
  return f'{section_name}.{name}' if section_name else name


_TYPES: dict[Any, str] = {
  bool: '`True` or `False`',
  int: 'integer',
  float: 'number',
  str: 'string',
  tuple[int, ...]: 'integers',
  tuple[float, ...]: 'numbers',
  tuple[str, ...]: 'strings',
}


def to_markdown() -> str:
  """Formats a table for each of SECTIONS: every key with its meaning, default and possible values."""
  return '\n\n'.join(_table(name, cls) for name, cls in SECTIONS.items())


def _table(name: str, cls: type) -> str:
  lines = [f'## {name or "Top level"}', '', inspect.cleandoc(cls.__doc__ or ''), '']
  lines += ['| key | meaning | default | values |', '|---|---|---|---|']
  defaults, found = cls(), keys(cls)
  for field in dataclasses.fields(cls):
    key_name, default = _full(name, field.name), getattr(defaults, field.name)
    cells = f'{found[field.name].meaning} | `{default!r}` | {_values(field.type, found[field.name])}'
    lines.append(f'| `{key_name}` | {cells} |')
  return '\n'.join(lines)


def _values(of_type: Any, declared: Key) -> str:
  """Describes the possible values of a key in words."""
  of_type, optional = _not_optional(of_type)
  words = ', '.join(f'`{choice}`' for choice in declared.choices) or _TYPES[of_type]
  words += ' or `None`' if optional else ''
  several = 'any of ' if declared.choices and typing.get_origin(of_type) is tuple else ''
  valid = f', {declared.valid.says}' if declared.valid else ''
  return several + words + valid + (', all different' if declared.distinct else '')


def _not_optional(of_type: Any) -> tuple[Any, bool]:
  """Returns a type without None, and whether None was part of it."""
  parts = typing.get_args(of_type)
  return (parts[0], True) if type(None) in parts else (of_type, False)


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields ('train.batch_size', 64) and so on, in the config's order; sequences become tuples."""
  for key, value in config.items():
    if isinstance(value, Mapping | Config):
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, tuple(value) if isinstance(value, list | tuple) else value


def check_keys(config: Mapping[str, Any], default: Mapping[str, Any]) -> None:
  """Raises UserError unless `config` has exactly the keys of `default`, and tuples of the right types.

  For an unknown key, the message suggests the nearest known one. (Types outside of tuples are checked when the flags are
  parsed.)
  """
  known = [key for key, _ in flatten(default)]
  given = [key for key, _ in flatten(config)]
  check_known(given, known)
  missing = [key for key in known if key not in given]
  if missing:
    raise UserError(f'config lacks the keys {", ".join(missing)}; start from configs/default.py')
  values = dict(flatten(config))
  for key, of_type in types().items():
    if typing.get_origin(of_type) is not tuple:
      continue
    entry, found = typing.get_args(of_type)[0], values[key]
    wanted = (int, float) if entry is float else entry
    if found is not None and not all(isinstance(e, wanted) and not isinstance(e, bool) for e in found):
      raise UserError(f'{key}={found} must hold {_TYPES[of_type]}')


def types() -> dict[str, Any]:
  """Returns the types of the keys of all SECTIONS, by their full names; None is left out of optional types."""
  return {
    _full(name, field.name): _not_optional(field.type)[0]
    for name, cls in SECTIONS.items()
    for field in dataclasses.fields(cls)
  }


def expand_paths(config: Config) -> None:
  """Expands `~` in all keys that are paths; raises UserError for a URL in a key that needs a path on disk."""
  for name, declared in all_keys().items():
    value = config
    *sections, last = name.split('.')
    for section_name in sections:
      value = value[section_name]
    if declared.path and value[last]:
      expanded = paths.local if declared.path == 'disk' else paths.expand
      value[last] = expanded(name, value[last])


def check_known(given: list[str], known: list[str]) -> None:
  """Raises UserError for the first key in `given` that is not known, and suggests the nearest one."""
  for key in given:
    if key not in known:
      raise UserError(f'config has no key {key!r}{nearest(key, known)}')


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns '; did you mean ...?' if a known word is similar, else ''."""
  close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else ''


def choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
  """Returns `table[value]`; raises UserError, naming the key and the nearest choice, if it does not exist."""
  if value not in table:
    raise UserError(f'{key}={value!r} is not one of {list(table)}{nearest(value, table)}')
  return table[value]


def build(key: str, cls: type, **fields: Any) -> Any:
  """Returns `cls(**fields)`; turns its TypeError or ValueError into a UserError that names the config's `key`."""
  try:
    return cls(**fields)
  except (TypeError, ValueError) as error:
    raise UserError(f'config.{key}: {error}') from error


def check_numbers(config: Config) -> None:
  """Raises UserError for numbers outside of their keys' ranges; None means that a number is not given."""
  declared = all_keys()
  for name, value in flatten(config):
    _check(name, value, declared[name])


def _check(name: str, value: Any, declared: Key) -> None:
  numbers = value if isinstance(value, tuple) else (value,)
  if declared.valid is not None:
    if not numbers:
      raise UserError(f'{name}=() must not be empty')
    if not all(number is None or declared.valid.holds(number) for number in numbers):
      raise UserError(f'{name}={value} must be {declared.valid.says}')
  if declared.distinct and len(set(numbers)) < len(numbers):
    twice = next(entry for entry in numbers if numbers.count(entry) > 1)
    raise UserError(f'{name}={value} lists {twice!r} twice')
