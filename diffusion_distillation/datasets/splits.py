"""Splits by name and slice, in tensorflow-datasets' syntax: 'train', 'train[:90%]', 'train[100:]+test'."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_distillation.config import nearest
from diffusion_distillation.errors import UserError


def select(key: str, spec: str, table: Mapping[str, Sequence[Any]]) -> list[Any]:
  """Selects the parts of `table` that `spec` names, concatenated in this order.

  Args:
    key: the config's key, for messages.
    spec: see the module; slices are in examples or percent.
    table: each split's examples, by name.

  Raises:
    UserError: the spec cannot be parsed, names an unknown split, or selects nothing.
  """
  import tensorflow_datasets as tfds  # imported late, because it takes half a second

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
  """Returns the error for a spec that cannot be parsed or names an unknown split."""
  given = [part.split('[')[0].strip() for part in spec.split('+')]
  hint = next((nearest(name, names) for name in given if name not in names), '')
  return UserError(
    f'{key}={spec!r}: there is no such split; the splits are {", ".join(names)}, whole or sliced, such as '
    f'{names[0]}[:90%]{hint}'
  )


def held_out_size(count: int) -> int:
  """Returns how many of `count` images without splits are held out: a twentieth, at least 2 and at most 10 000."""
  return max(2, min(count // 20, 10_000))


def held_out(count: int) -> tuple[str, str]:
  """Returns the (training, evaluation) splits of images without splits: the last images are held out; see `held_out_size`."""
  size = held_out_size(count)
  return f'train[:-{size}]', f'train[-{size}:]'
