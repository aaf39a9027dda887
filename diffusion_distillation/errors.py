"""What can go wrong from outside, each with the exit code that `main.py` ends with.

The message is one line that says what is wrong and what to do.
"""


class UserError(Exception):
  """Something that the user can mend: a configuration, a path, a flag."""

  exit_code = 2


class DamagedError(UserError):
  """A file in the workdir is not what was written there."""

  exit_code = 3


class NumericalError(UserError):
  """Loss or gradients stayed non-finite."""

  exit_code = 4


class StorageError(UserError):
  """The disk does not take what is written, or has lost it."""

  exit_code = 5


class Preempted(UserError):
  """Asked to stop (SIGTERM, SIGINT); everything is saved, and the same command goes on."""

  exit_code = 75  # EX_TEMPFAIL: try again
