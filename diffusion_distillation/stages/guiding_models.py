"""Reads a guiding model: a weaker model, from whose predictions another one's are moved away."""

import os
import pathlib

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Conditioning
from diffusion_distillation.networks.guidance import GuidingModel
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.stages import model, model_folders
from diffusion_distillation.system.checkpoints import digest


def read(
  key: str,
  path: str | os.PathLike[str],
  taken: Conditioning,
  space: Space,
  image_shape: tuple[int, ...],
) -> GuidingModel:
  """Reads the model in a folder, in a stage, or of the last finished stage of a workdir, to guide another model.

  Args:
    key: the flag or config key that names the path, for error messages.
    path: where the guiding model is.
    taken: the conditioning of the model that is guided.
    space: the space of that model.
    image_shape: the shape of its images, (H, W, C).

  Raises:
    UserError: there is no model, or it does not fit the one that is guided.
    DamagedError: a file of the model differs from what was written.
  """
  given = f'{key}={os.fspath(path)}'
  try:
    folder = model_folders.find(pathlib.Path(paths.on_disk(key, path)))
    described = model.read(folder, weights=False)
  except UserError as error:
    raise UserError(f'{given}: {error}') from error
  if conditioning.weights(taken):
    raise UserError(
      f'{given}: the model that is to be guided takes the weight of guidance as an input and is called once; guide its '
      'teacher instead'
    )
  if described.image_shape != image_shape or described.space != space:
    raise UserError(
      f'{given}: this model draws images of shape {described.image_shape} in {type(described.space).__name__.lower()}, and the one '
      f'that it should guide images of shape {image_shape} in {type(space).__name__.lower()}'
    )
  for name, condition in described.denoise.conditioning.items():
    if taken.get(name) != condition:
      own = 'has no such input' if name not in taken else f'takes {taken[name]}'
      raise UserError(
        f'{given}: this model takes {condition} as {name!r}, and the one that it should guide {own}'
      )
  stored = model.read(folder)
  return GuidingModel(stored.denoise, stored.digest or digest(stored.params), stored.params)
