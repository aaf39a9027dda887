"""Errors with external causes, each with the exit code of `main.py`.

The message of each error is one line that says what is wrong and what to do.
"""

import errno
import os
import pathlib


class UserError(Exception):
  """An error that the user can fix, such as in a config, a path or a flag."""

  exit_code = 2


class DamagedError(UserError):
  """A file in the workdir differs from what was written."""

  exit_code = 3


class NumericalError(UserError):
  """The loss or the gradients stayed non-finite."""

  exit_code = 4


class StorageError(UserError):
  """The disk cannot be written to, or has lost files."""

  exit_code = 5


class QualityError(UserError):
  """A student falls short of its teacher by more than the config allows."""

  exit_code = 6


class Preempted(UserError):
  """The process was asked to stop (SIGTERM, SIGINT). Everything is saved; the same command resumes."""

  exit_code = 75  # EX_TEMPFAIL: try again


# Errors of a disk that is full, read-only, broken, gone, or over its quota.
_OF_THE_DISK = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT)


def of_disk(error: OSError, workdir: str | os.PathLike[str] | None) -> UserError:
  """Returns what an error of the operating system means for a run in `workdir`: a StorageError if the disk is to blame."""
  directory = None if workdir is None else pathlib.Path(workdir)
  if (gone := _vanished(error, directory)) is not None:
    return StorageError(f'{gone} has vanished; restore it, and run the same command again')
  if error.errno not in _OF_THE_DISK:
    return UserError(str(error))
  where = error.filename or workdir or 'the output'
  advice = 'free up space or repair the disk, and run the same command again'
  return StorageError(f'{where}: {error.strerror}; {advice}')


def _vanished(error: OSError, workdir: pathlib.Path | None) -> pathlib.Path | None:
  """Returns the directory in the workdir that no longer exists, if that caused the error; else None."""
  if error.errno != errno.ENOENT or error.filename is None or workdir is None:
    return None
  directory = pathlib.Path(error.filename).parent
  return directory if workdir in directory.parents and not directory.exists() else None
