"""Atomic writes of JSON files, and locks that admit one process at a time to a directory."""

import fcntl
import json
import os
import pathlib
import sys
from typing import IO, Any

from diffusion_distillation.errors import DamagedError, UserError

LOCK = '.lock'


def writes() -> bool:
  """Whether this is the first process of the run, which is the only one that writes files and prints."""
  jax = sys.modules.get('jax')  # the processes that read images do not import it
  return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file atomically."""
  if not writes():
    return
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(value, indent=2) + '\n')
  os.replace(temporary, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object from a file; raises DamagedError if the file contains none."""
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise DamagedError(f'{path} is damaged ({error}); restore it from a copy') from error
  if not isinstance(value, dict):
    raise DamagedError(f'{path} is damaged (no JSON object); restore it from a copy')
  return value


def lock(directory: pathlib.Path, key: str) -> IO[str]:
  """Creates `directory` if necessary and locks it against other processes; close the returned file to release the lock.

  Raises:
    UserError: the directory is not writable, or another process is using it; the message names `key`.
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
