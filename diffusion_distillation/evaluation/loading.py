"""Loads models from a folder, to sample from them and call them as denoisers, without their config."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.sampling import Chosen, Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.guidance import check, default_weight
from diffusion_distillation.stages import model
from diffusion_distillation.stages.model import StoredModel

_BATCH = 256


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A model that is ready to sample from.

  Attributes:
    stored: the contents of its folder: network, parameters, schedule, provenance and so on.
  """

  stored: StoredModel

  def sample(
    self,
    num_samples: int,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
  ) -> np.ndarray:
    """Draws images; image k is a function of (seed, k) and its label.

    Args:
      num_samples: number of images.
      seed: seed of the noise.
      labels: classes to draw in turn, -1 for no class; by default all classes, so that they are balanced.
      steps: sampling steps per image; by default the number that the model is trained for.
      sampler: a name in `samplers.SAMPLERS`; by default the one that the model is trained for.
      guidance: the weight W of classifier-free guidance, x + W (x - x without a class), for models that were trained with
        label dropout or take the weight as an input; 0 for no guidance, which is the default unless the smallest weight
        that the model takes is larger. Other software often calls 1 + W the guidance scale.
      guidance_interval: noise levels sigma / alpha, (low, high), between which steps are guided; None for all.

    Returns:
      (num_samples, H, W, C) uint8.

    Raises:
      UserError: the sampler or a label does not exist, a number is out of range, the model's schedule has no grid with
        this number of steps, or the model cannot be guided.
    """
    chosen = self.check_labels(labels)
    if num_samples < 1 or (steps is not None and steps < 1):
      raise UserError(f'num_samples={num_samples} and steps={steps} must be positive')
    if not 0 <= seed < 2**31:
      raise UserError(f'seed={seed} must be zero or more, and below 2^31')
    cls = choose('sampler', sampler or self.stored.sampler, samplers.SAMPLERS)
    name, num_steps = self.stored.times, steps or self.stored.num_steps
    try:
      grid = times.make_grid(name, num_steps, self.stored.schedule)
    except ValueError as error:
      raise UserError(f'steps={num_steps}, times={name}: {error}') from error
    weight = default_weight(self.stored.denoise.conditioning) if guidance is None else guidance
    try:
      by = make_guidance(weight, guidance_interval or ())
    except ValueError as error:
      raise UserError(f'guidance={weight}, guidance_interval={guidance_interval}: {error}') from error
    told = self.stored.denoise.conditioning
    check('guidance', by, told, self.stored.cond_dropout, (chosen or {}).get('label'))
    draw = self.drawer(cls(), self.stored.clip_x, min(_BATCH, num_samples), by)
    return draw.draw(self.stored.params, grid, num_samples, seed, chosen)

  def check_labels(self, labels: Sequence[int] | None) -> Chosen:
    """Returns the labels in the form that `Drawer` takes; raises UserError for unknown labels."""
    if labels is None:
      return None
    classes = conditioning.classes(self.stored.denoise.conditioning)
    if classes is None:
      raise UserError(f'labels={list(labels)}, but the model is unconditional')
    if not len(labels) or not all(classes.NONE <= label < classes.count for label in labels):
      raise UserError(f'labels={list(labels)} must be in 0 ... {classes.count - 1}, or -1 for no class')
    return {'label': list(labels)}

  def drawer(
    self, sampler: samplers.Sampler, clip_x: bool, batch_size: int, guidance: Guidance = NONE
  ) -> Drawer:
    """Returns a `Drawer` for this model and the given sampler."""
    stored = self.stored
    return Drawer(
      denoise=stored.denoise,
      sampler=sampler,
      schedule=stored.schedule,
      space=stored.space,
      image_shape=stored.image_shape,
      batch_size=batch_size,
      clip_x=clip_x,
      guidance=guidance,
    )

  def denoise(self, z: jax.Array, logsnr: jax.Array, cond: Cond = None) -> Prediction:
    """Returns the model's estimates of x and eps in z = alpha x + sigma eps.

    Args:
      z: (B, ...) in the model's space.
      logsnr: (B,), log(alpha^2 / sigma^2), finite.
      cond: arrays with a leading batch axis, such as `label` (B,); None for an unconditional model.
    """
    return self.stored.denoise(self.stored.params, z, logsnr, cond)


def load(path: str | os.PathLike[str]) -> LoadedModel:
  """Loads the model in a folder, in a stage, or of the last finished stage of a workdir.

  Args:
    path: a folder with `model.json`, the directory of a stage, or a workdir.

  Raises:
    UserError: there is no model, or it uses features that this version does not know.
    DamagedError: a file of the model differs from what was written.
  """
  return LoadedModel(model.read(find(paths.on_disk('load: path', path))))


def find(path: pathlib.Path) -> pathlib.Path:
  """Returns the model's folder at or below `path`; for a workdir with several stages, the last one's."""
  for folder in (path, path / 'model'):
    if (folder / model.DESCRIPTION).is_file():
      return folder
  found = list(path.glob(f'*/model/{model.DESCRIPTION}'))
  if not found:
    raise UserError(
      f'{path} holds no model: there is no {model.DESCRIPTION} in it or in any of its stages'
    )
  return max(found, key=lambda file: file.stat().st_mtime_ns).parent


def chosen_classes(stored: StoredModel, given: Sequence[str], name: str = '--classes=') -> Chosen:
  """Returns the classes to draw in turn, for a `Drawer`; None if none are given, so that all classes are drawn equally often.

  Args:
    stored: the model.
    given: names or numbers of classes, see `conditioning.labels_by_name`, or 'none' for images without a class.
    name: the start of the error messages, such as the flag.

  Raises:
    UserError: the model is unconditional, or a class does not exist.
  """
  classes, text = conditioning.classes(stored.denoise.conditioning), ','.join(given)
  if not given:
    return None
  if classes is None:
    raise UserError(f'{name}{text}: {stored.provenance.get("stage", "the model")} is unconditional')
  if list(given) == ['none'] and 'none' not in stored.class_names:
    if not stored.cond_dropout:
      raise UserError(
        f'{name}none: this model was trained without label dropout (dataset.label_dropout=0), so it cannot draw '
        'images without a class'
      )
    return {'label': [classes.NONE]}
  known = conditioning.labels_by_name(classes.count, stored.class_names)
  if not all(c in known for c in given):
    raise UserError(f'{name}{text}: {conditioning.choices(classes.count, stored.class_names)}')
  return {'label': [known[c] for c in given]}
