"""Prepares command-line arguments for absl: configs by name, `~` in paths, whole numbers such as 1e3."""

import decimal
import importlib
import logging
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator

from absl import flags

from diffusion_distillation import config, paths
from diffusion_distillation.errors import UserError

_log = logging.getLogger(__name__)
_CONFIG = re.compile(r'--?config(?:\.([\w.]+))?(?:=(.*))?', re.DOTALL)
_NUMBER = re.compile(r'(?<![\w.])[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])')
_LARGEST = decimal.Decimal(10) ** 18


def configs() -> types.ModuleType:
  """Returns the package of configs, which is installed within this one, or next to it in a clone."""
  try:
    return importlib.import_module('diffusion_distillation.configs')
  except ModuleNotFoundError:
    return importlib.import_module('configs')


def config_names() -> dict[str, pathlib.Path]:
  """Returns the files of the configs that come with the program, by name."""
  found = pathlib.Path(next(iter(configs().__path__))).glob('*.py')
  return {path.stem: path for path in sorted(found) if 'def get_config' in path.read_text()}


def find_config(given: str) -> str:
  """Returns the file of `--config=given`, a path or the name of a config that comes with the program; keeps a `:VARIANT`.

  Raises:
    UserError: there is no such file, and no config with this name.
  """
  name, colon, variant = given.partition(':')
  path = pathlib.Path(paths.expand('--config', name))
  if not path.is_file():
    ours = config_names()
    by_name = path.suffix in ('', '.py') and str(path.parent) in ('.', 'configs')
    if not by_name or path.stem not in ours:
      raise UserError(
        f'--config={given}: there is no such file, and no config with this name; the configs are {", ".join(ours)}'
        + config.nearest(path.stem, ours)
      )
    path = ours[path.stem]
  elif path.absolute().parent.name == 'configs':
    _prefer(path.absolute())
  return f'{path}{colon}{variant}'


def _prefer(config_file: pathlib.Path) -> None:
  """Makes `from configs import ...` in a user's config find the files next to it before the program's own configs.

  Modules that are already imported, such as `default`, are not replaced; a warning names each file that is therefore ignored.
  """
  package, folder = importlib.import_module('configs'), config_file.parent
  if str(folder) not in package.__path__:
    package.__path__.insert(0, str(folder))
  for path in sorted(set(folder.glob('*.py')) - {config_file, folder / '__init__.py'}):
    used = getattr(getattr(package, path.stem, None), '__file__', None)
    if used and os.path.isfile(used) and path.read_bytes() != pathlib.Path(used).read_bytes():
      _log.warning('%s is ignored: configs.%s is %s; rename the file', path, path.stem, used)


def rewrite_integers(text: str) -> str:
  """Rewrites each whole number in `text`, such as 1e3 or 1000.0, as an integer; leaves the rest unchanged."""

  def rewrite(match: re.Match[str]) -> str:
    try:
      number = decimal.Decimal(match[0].replace('_', ''))
    except decimal.InvalidOperation:  # the exponent is too large; the parser will reject the number
      return match[0]
    fits = abs(number) < _LARGEST and number == number.to_integral_value()
    return str(int(number)) if fits else match[0]

  return _NUMBER.sub(rewrite, text)


class WholeParser(flags.IntegerParser):
  """absl's parser of integers, extended to accept 1e3."""

  def convert(self, argument: int | str) -> int:
    return super().convert(rewrite_integers(argument) if isinstance(argument, str) else argument)


def prepare(argv: list[str]) -> list[str]:
  """Rewrites the arguments after the program's name for absl; `config.SECTIONS` must be filled.

  Raises:
    UserError: there is no such config, or the value of an integer key is another number.
  """
  given = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  kinds = config.types()
  found = list(_joined(given, kinds))
  return [_prepared(argument, kinds) for argument in _last(found, kinds)]


def _last(argv: list[str], kinds: dict[str, typing.Any]) -> Iterator[str]:
  """Leaves out a tuple that a later argument overrides, as with other values; ml_collections would join the two."""
  end = argv.index('--') if '--' in argv else len(argv)
  keys = [(_CONFIG.fullmatch(argument) or ('', ''))[1] for argument in argv[:end]]
  for k, argument in enumerate(argv):
    if (
      k >= end
      or typing.get_origin(kinds.get(keys[k] or '')) is not tuple
      or keys[k] not in keys[k + 1 :]
    ):
      yield argument


def _joined(argv: list[str], kinds: dict[str, typing.Any]) -> Iterator[str]:
  """Joins each `--config VALUE` and `--config.KEY VALUE` to one argument with `=`."""
  waiting = iter(argv)
  for argument in waiting:
    match = _CONFIG.fullmatch(argument)
    if argument == '--':
      yield argument
      yield from waiting
    elif match is None or match[2] is not None or kinds.get(match[1] or '') is bool:
      yield argument
    else:
      value = next(waiting, None)
      yield argument if value is None else f'{argument}={value}'


def _prepared(argument: str, kinds: dict[str, typing.Any]) -> str:
  match = _CONFIG.fullmatch(argument)
  if match is None or match[2] is None:
    return argument
  name, value = match[1], match[2]
  if name is None:
    return f'--config={find_config(value)}'
  kind = kinds.get(name)
  if int not in (kind, *typing.get_args(kind)):
    return argument
  value = rewrite_integers(value)
  if kind is int and value not in ('', 'None') and not re.fullmatch(r'[+-]?[\d_]+', value):
    raise UserError(f'{name}={value} must be an integer')
  return f'--config.{name}={value}'
