"""Splits by name and slice, in tensorflow-datasets' syntax: 'train', 'train[:90%]', 'train[100:]+test'."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_distillation.config import nearest
from diffusion_distillation.errors import UserError


def select(key: str, spec: str, table: Mapping[str, Sequence[Any]]) -> list[Any]:
  """The parts of `table` that `spec` names, one after the other.

  Args:
    key: of the config, for messages.
    spec: see the module; slices count examples, or per cent.
    table: each split's examples, by name.

  Raises:
    UserError: it cannot be parsed, there is no such split, or nothing is in it.
  """
  import tensorflow_datasets as tfds  # not before it is needed: it takes half a second

  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[len(examples)], num_bytes=0)
    for name, examples in table.items()
  }
  try:
    parts = tfds.core.ReadInstruction.from_spec(spec).to_absolute(infos)
    found = [example for part in parts for example in table[part.splitname][part.from_ : part.to]]
  except (ValueError, NotImplementedError) as error:
    raise bad_spec(key, spec, list(table)) from error
  if not found:
    raise UserError(f'{key}={spec!r} holds no image')
  return found


def bad_spec(key: str, spec: str, names: Sequence[str]) -> UserError:
  """The error for a split that there is not, or that cannot be read."""
  given = [part.split('[')[0].strip() for part in spec.split('+')]
  hint = next((nearest(name, names) for name in given if name not in names), '')
  return UserError(
    f'{key}={spec!r}: there are the splits {", ".join(names)}, whole or sliced such as '
    f'{names[0]}[:90%]{hint}'
  )


def held_out_size(count: int) -> int:
  """Of `count` images that came without splits: a twentieth, two at least, 10 000 at most."""
  return max(2, min(count // 20, 10_000))


def held_out(count: int) -> tuple[str, str]:
  """Splits for images that came without: the last ones are held out; see `held_out_size`."""
  size = held_out_size(count)
  return f'train[:-{size}]', f'train[-{size}:]'
