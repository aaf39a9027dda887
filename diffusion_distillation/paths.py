"""Paths given by users: `~` is expanded, and URLs are refused where a local file system is needed."""

import os
import pathlib
import re

from diffusion_distillation.errors import UserError

_URL = re.compile(r'([a-zA-Z][a-zA-Z0-9+.-]+):/')  # gs:/ as well: pathlib shortens gs:// to it

# Paths that are only read.
_READ = (
  *('--checkpoint', '--images', '--inception', 'load: path'),
  *('evaluation.inception', 'evaluation.dinov2', 'evaluation.reference'),
)


def expand(name: str, given: str) -> str:
  """Replaces `~` or `~user` at the start of `given` by the home directory; URLs are returned unchanged.

  Args:
    name: name of the flag or config key that the path comes from, for error messages.
    given: the path.

  Raises:
    UserError: the user or the home directory is not known.
  """
  found = os.path.expanduser(given)
  if found.startswith('~'):
    user = found.partition('/')[0]
    raise UserError(
      f'{name}={given}: the home directory {user} is not known'
      + ('; set $HOME, or give the full path' if user == '~' else '')
    )
  return found


def local(name: str, given: str) -> str:
  """Like `expand`, for paths that must be on a disk: also raises UserError for a URL."""
  if (url := _URL.match(given)) is not None:
    mount = '' if url[1] == 'file' else 'mount the bucket, for example with gcsfuse, or '
    if name in _READ:
      raise UserError(
        f'{name}={given} is a URL, but must be a path: {mount}copy it to a disk, and give a path on a disk'
      )
    raise UserError(
      f'{name}={given} is a URL, but files are locked and renamed there, which needs a file system: {mount}'
      'give a path on a disk that persists, such as a persistent volume or NFS'
    )
  return expand(name, given)


def on_disk(name: str, given: str | os.PathLike[str]) -> pathlib.Path:
  """Like `local`, but returns an absolute `pathlib.Path`."""
  return pathlib.Path(local(name, os.fspath(given))).absolute()
