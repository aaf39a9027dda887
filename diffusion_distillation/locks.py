"""One process at a time in a directory."""

import fcntl
import pathlib
from typing import IO

from diffusion_distillation.errors import UserError

NAME = '.lock'


def lock(directory: pathlib.Path, key: str) -> IO[str]:
  """Makes `directory` if need be; returns the lock, to be closed, that keeps other processes out.

  Raises:
    UserError: it cannot be written, or another process is using it; the message names `key`.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / NAME).open('w')
  except OSError as error:
    raise UserError(f'cannot write to {key}={directory}: {error.strerror}') from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.close()
    raise UserError(f'another run is using {key}={directory}') from error
  return file
