"""Attempts: the checkpoints that a stage went back to, in order to continue with other batches and other noise.

stage_dir/attempts.json   the updates that training went back to, in order; see `Stage.attempts`

The file is written before training continues, so that a resumed or replayed stage draws the same batches and noise.
"""

import dataclasses
import pathlib

from diffusion_distillation.errors import DamagedError
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files

_NAME = 'attempts.json'


def of(stage: Stage, directory: pathlib.Path) -> Stage:
  """Returns the stage with the attempts recorded in its directory; no file means no attempts."""
  path = directory / _NAME
  found = files.read_json(path).get('went_back_to') if path.is_file() else []
  if not isinstance(found, list) or not all(isinstance(update, int) for update in found):
    raise DamagedError(f'{path} is damaged (no list of updates in it); restore it from a copy')
  return dataclasses.replace(stage, attempts=tuple(found))


def record(stage: Stage, directory: pathlib.Path) -> None:
  """Records the attempts of a stage; every process must call this function."""
  files.write_json(directory / _NAME, {'went_back_to': list(stage.attempts)})
  cluster.barrier()
