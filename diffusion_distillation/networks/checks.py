"""Checks of hyper-parameters and image shapes that networks share; errors are one sentence."""

from collections.abc import Collection, Mapping
from typing import Any


def check_choices(choices: Mapping[str, tuple[Any, Collection[Any]]]) -> None:
  """Raises ValueError unless each hyper-parameter, by name (value, known values), has a known value."""
  for name, (value, known) in choices.items():
    if value not in known:
      raise ValueError(f'{name}={value!r} is not one of {list(known)}')


def check_sides(image_shape: tuple[int, ...], levels: int, name: str) -> None:
  """Raises ValueError unless images (H, W, C) can be halved `levels` - 1 times.

  Args:
    image_shape: shape of the images.
    levels: number of resolutions.
    name: name of the hyper-parameter that sets the number of resolutions.
  """
  height, width = image_shape[:2]
  factor = 2 ** (levels - 1)
  if height % factor or width % factor:
    raise ValueError(
      f'{levels} levels ({name}) need images whose sides are divisible by {factor}; these are {height}x{width}'
    )
