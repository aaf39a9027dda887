"""Files that several programs may find: JSON whole or not at all, and one process at a time in a directory."""

import fcntl
import json
import os
import pathlib
import sys
from typing import IO, Any

from diffusion_distillation.errors import DamagedError, UserError

LOCK = '.lock'


def writes() -> bool:
  """Whether this process is the one of the run that writes and speaks: the first."""
  jax = sys.modules.get('jax')  # the processes that read images do without
  return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON whole or not at all."""
  if not writes():
    return
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  os.replace(temporary, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises DamagedError, naming the file, where it holds none."""
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise DamagedError(f'{path} is damaged ({error}); restore it from a copy') from error
  if not isinstance(value, dict):
    raise DamagedError(f'{path} is damaged (no JSON object); restore it from a copy')
  return value


def lock(directory: pathlib.Path, key: str) -> IO[str]:
  """Makes `directory` if need be; returns the lock, to be closed, that keeps other processes out.

  Raises:
    UserError: it cannot be written, or another process is using it; the message names `key`.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK).open('w')
  except OSError as error:
    raise UserError(f'cannot write to {key}={directory}: {error.strerror}') from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise UserError(f'another run is using {key}={directory}') from error
  return file
