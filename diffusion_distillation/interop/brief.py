"""What files from elsewhere say, for messages."""

import reprlib
from typing import Any


def brief(value: Any) -> str:
  """`repr(value)`, at most 80 characters, without building all of it: containers that share containers have no end."""
  return reprlib.repr(value)[:80]
