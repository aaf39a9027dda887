"""Reads and checks the state dicts of public networks whose features are compared."""

import os
import pathlib
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import torch_files

Arrays = dict[str, np.ndarray]


def read(path: str | os.PathLike[str], flag: str, expected: str) -> tuple[Arrays, str]:
  """Reads a .safetensors file, or a state dict that torch.save wrote.

  Args:
    path: the file.
    flag: the flag or config key that the path comes from, for messages.
    expected: the file to name, for messages: 'the pt_inception-2015-12-05 weights of pytorch-fid'.

  Returns:
    The tensors by name, and FLAG=PATH for messages.

  Raises:
    UserError: the file does not exist or is damaged.
  """
  source = f'{flag}={os.fspath(path)}'
  file = paths.on_disk(flag, path)
  if not file.is_file():
    raise UserError(f'{source}: there is no such file; name {expected}')
  is_safetensors = file.suffix.lower() == '.safetensors'
  return (_read_safetensors(file, source) if is_safetensors else torch_files.read(file, source)), source


def _read_safetensors(path: pathlib.Path, source: str) -> Arrays:
  try:
    return {name: np.asarray(value) for name, value in safetensors.flax.load_file(path).items()}
  except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
    raise UserError(f'{source} is damaged or not a safetensors file ({error}); copy it again') from error


def check_names(
  given: Collection[str], wanted: Collection[str], source: str, network: str, expected: str
) -> None:
  """Raises UserError unless a file has the tensors `wanted` and no others; `network` is what it would be, for the message."""
  missing, unknown = set(wanted) - set(given), set(given) - set(wanted)
  for problem, names in (('lacks', missing), ('has', unknown)):
    if names:
      more = f' and {len(names) - 1} other{"s" * (len(names) > 2)}' if len(names) > 1 else ''
      raise UserError(
        f'{source} {problem} {min(names)[:80]}{more}, so it is not {network}; name {expected}'
      )


def to_float32(
  given: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  source: str,
  network: str,
  expected: str,
) -> Arrays:
  """Returns the tensors of `shapes` in float32, by name in order; raises UserError for another shape, type or number that is not finite."""
  state: Arrays = {}
  for name in sorted(shapes):
    value = np.asarray(given[name])
    if value.shape != shapes[name]:
      raise UserError(
        f'{source}: {name} has shape {value.shape} instead of {shapes[name]}, so it is not {network}; name {expected}'
      )
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f'{source}: {name} holds {value.dtype} instead of floating-point numbers')
    state[name] = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(state[name]).all():
      raise UserError(f'{source}: {name} has numbers that are not finite')
  return state
