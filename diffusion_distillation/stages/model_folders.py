"""Finds the folder of a model in a stage or a workdir."""

import pathlib
from collections.abc import Sequence

from diffusion_distillation.errors import UserError
from diffusion_distillation.stages import model
from diffusion_distillation.system import files


def find(path: pathlib.Path) -> pathlib.Path:
  """Returns the model's folder at or below `path`; for a workdir with several stages, that of the last one in its plan."""
  for folder in (path, path / 'model'):
    if (folder / model.DESCRIPTION).is_file():
      return folder
  found = list(path.glob(f'*/model/{model.DESCRIPTION}'))
  if not found:
    raise UserError(
      f'{path} holds no model: there is no {model.DESCRIPTION} in it or in any of its stages'
    )
  methods = _methods(path)
  return max(
    found, key=lambda file: (*_place(file.parent.parent.name, methods), file.stat().st_mtime_ns)
  ).parent


def _methods(workdir: pathlib.Path) -> list[str]:
  """Returns the methods of the run in a directory, in the order of its plan; [] if there is no run, or no valid config."""
  path = workdir / 'config.json'
  try:
    found = files.read_json(path).get('methods') if path.is_file() else None
  except (UserError, AttributeError):
    return []
  return [str(name) for name in found] if isinstance(found, list) else []


def _place(stage: str, methods: Sequence[str]) -> tuple[int, int]:
  """Returns the place of a stage in the plan of these methods; first comes the base, then stages of other methods."""
  method, _, steps = stage.rpartition('_')
  if not method or not steps.isdecimal():
    method, steps = stage, '0'
  if method not in methods:
    return -2 if stage == 'base' else -1, 0
  return methods.index(method), -int(steps)
