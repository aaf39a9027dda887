"""Flags of `--mode=sample` that depend on the model: times and guidance."""

from collections.abc import Sequence

import numpy as np

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import Guidance, make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.sampling import Chosen
from diffusion_distillation.networks.guidance import asked_weight, check
from diffusion_distillation.stages.model import StoredModel


def grid(stored: StoredModel, given: Sequence[str], steps: int | None, name: str | None) -> np.ndarray:
  """Returns the times to sample at, (N + 1,): `given` if it is not empty, else the grid `name` with `steps` steps.

  Raises:
    UserError: both times and steps are given, the times are not a valid grid, or the model has no grid of this name.
  """
  if given and steps:
    raise UserError('give --steps or --times, not both')
  if given:
    numbers = _numbers('--times', given, '0,0.25,1')
    try:
      return times.grid(numbers)
    except ValueError as error:
      raise UserError(f'--times={",".join(given)}: {error}, such as 0,0.25,1') from error
  name = name or stored.times
  try:
    return times.make_grid(name, steps or stored.num_steps, stored.schedule)
  except ValueError as error:
    raise UserError(f'--grid={name}: {error}') from error


def guidance(
  stored: StoredModel,
  weight: float | None,
  interval: Sequence[str],
  chosen: Chosen,
  by_model: bool = False,
) -> Guidance:
  """Returns the guidance that `--guidance` and `--guidance_interval` specify; without a weight, the model's default.

  `by_model` says whether there is a guiding model.

  Raises:
    UserError: a number is out of range, or the model cannot be guided; see `check`.
  """
  text = ','.join(interval)
  weight = asked_weight('--guidance', weight, stored.denoise.conditioning)
  if interval and not weight:
    raise UserError(f'--guidance_interval={text} only applies to --guidance above 0')
  ends = _numbers('--guidance_interval', interval, '0.3,3')
  try:
    found = make_guidance(weight, ends)
  except ValueError as error:
    given = f'--guidance={weight:g}' + (f' --guidance_interval={text}' if interval else '')
    raise UserError(f'{given}: {error}') from error
  labels = (chosen or {}).get('label')
  check('--guidance', found, stored.denoise.conditioning, stored.cond_dropout, labels, by_model)
  return found


def _numbers(flag: str, given: Sequence[str], example: str) -> list[float]:
  try:
    return [float(number) for number in given]
  except ValueError as error:
    raise UserError(f'{flag}={",".join(given)}: must be numbers, such as {example}') from error
