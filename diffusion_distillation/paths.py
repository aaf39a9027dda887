"""Paths that users give: `~` is expanded, and URLs are refused where only a disk will do."""

import os
import pathlib
import re

from diffusion_distillation.errors import UserError

_URL = re.compile(r'([a-zA-Z][a-zA-Z0-9+.-]+):/')  # gs:/ as well: what a shell or a path makes of gs://

_READ = ('--checkpoint', 'load: path')  # where nothing is written


def expand(name: str, given: str) -> str:
  """`given` with its `~` or `~user` replaced by the home directory; URLs stay as they are.

  Args:
    name: of the flag or the config's key that the user gave it by, for messages.
    given: the path.

  Raises:
    UserError: there is no such user, or no home directory.
  """
  found = os.path.expanduser(given)
  if found.startswith('~'):
    user = found.partition('/')[0]
    raise UserError(
      f'{name}={given}: the home directory {user} is not known'
      + ('; set $HOME, or give the whole path' if user == '~' else '')
    )
  return found


def local(name: str, given: str) -> str:
  """As `expand`, for what has to be on a disk; raises UserError for a URL, too."""
  if (url := _URL.match(given)) is not None:
    mount = '' if url[1] == 'file' else 'mount the bucket, for example with gcsfuse, or '
    if name in _READ:
      raise UserError(
        f'{name}={given} is a URL, but must be a path: {mount}copy it to a disk, and give a path on a disk'
      )
    raise UserError(
      f'{name}={given} is a URL, but files are locked and renamed there, which takes a file system: {mount}'
      'give a path on a disk that stays, such as a persistent disk or NFS'
    )
  return expand(name, given)


def on_disk(name: str, given: str | os.PathLike[str]) -> pathlib.Path:
  """As `local`, absolute."""
  return pathlib.Path(local(name, os.fspath(given))).absolute()
