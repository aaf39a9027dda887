"""Reads checkpoints of the code released with Salimans & Ho (2022): a Flax msgpack file with parameters in `ema_params`."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.training.state import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The contents of a file that are used.

  Attributes:
    ema_params: arrays by module and layer, float32, as they are in the file.
    num_sample_steps: number of steps that the model was distilled to; 0 for a base trained in continuous time.
    sha256: sha256 of the file.
  """

  ema_params: dict[str, Any]
  num_sample_steps: int
  sha256: str


def read(path: pathlib.Path) -> Checkpoint:
  """Reads a file; nothing in it is executed.

  Raises:
    UserError: the file does not exist, or is not such a checkpoint.
  """
  try:
    content = path.read_bytes()
  except OSError as error:
    raise UserError(f'--checkpoint={path}: {error.strerror}') from error
  try:
    tree = serialization.msgpack_restore(content)
    ema_params = tree['ema_params']
    num_sample_steps = int(tree.get('num_sample_steps') or 0)
    leaves = traverse_util.flatten_dict(ema_params, sep='/').values()
    if not leaves or not all(isinstance(leaf, np.ndarray) for leaf in leaves):
      raise ValueError('ema_params is not a tree of arrays')
    if num_sample_steps < 0:
      raise ValueError(f'num_sample_steps is {num_sample_steps}')
  except Exception as error:  # with unknown content, msgpack may raise anything
    raise UserError(
      f'--checkpoint={path} is not a checkpoint of the released code, a flax msgpack file with '
      f'ema_params in it ({type(error).__name__}: {str(error)[:100]})'
    ) from error
  return Checkpoint(ema_params, num_sample_steps, hashlib.sha256(content).hexdigest())


def fit(found: dict[str, Any], expected: Params, path: pathlib.Path) -> Params:
  """Converts the file's parameters to the shapes that a network expects, such as (1, 1, 1, C) to (C,).

  Args:
    found: `Checkpoint.ema_params`.
    expected: the network's parameters, or their shapes.
    path: path of the file, for messages.

  Raises:
    UserError: a parameter is missing, unexpected, of the wrong size or not finite; the message names it.
  """
  wanted = traverse_util.flatten_dict(expected, sep='/')
  have = traverse_util.flatten_dict(found, sep='/')
  problems = [f'{name} is missing' for name in wanted.keys() - have.keys()]
  problems += [f'{name} {np.shape(have[name])} is not in it' for name in have.keys() - wanted.keys()]
  params = {}
  for name in wanted.keys() & have.keys():
    values, shape = np.asarray(have[name]), wanted[name].shape
    squeezed = tuple(n for n in values.shape if n != 1) == tuple(n for n in shape if n != 1)
    if not squeezed or not np.issubdtype(values.dtype, np.floating):
      problems.append(f'{name} has shape {values.shape} {values.dtype}, the config needs {shape}')
    elif not np.isfinite(values).all():
      problems.append(f'{name} is not finite')
    else:
      params[name] = values.astype(np.float32).reshape(shape)
  if problems:
    more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
    raise UserError(
      f"--checkpoint={path} does not fit the config's network: {'; '.join(sorted(problems)[:3])}{more}"
    )
  return traverse_util.unflatten_dict(params, sep='/')
