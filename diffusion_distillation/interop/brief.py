"""Short representations of values from imported files, for messages."""

import reprlib
from typing import Any


def brief(value: Any) -> str:
  """Returns at most 80 characters of `repr(value)`, without building all of it: nested shared containers may be huge."""
  return reprlib.repr(value)[:80]
