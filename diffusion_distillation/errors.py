"""Errors with external causes, each with the exit code of `main.py`.

The message of each error is one line that says what is wrong and what to do.
"""


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
