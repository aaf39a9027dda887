"""Loads models from a folder, to sample from them and call them as denoisers, without their config."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.sampling import Chosen, Drawer, at_a_time
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import NONE_OF, Cond
from diffusion_distillation.networks.guidance import GuidingModel, asked_weight, check
from diffusion_distillation.stages import guiding_models, model, model_folders
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
    num_samples: int | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    prompts: Sequence[str] | None = None,
    guiding_model: str | os.PathLike[str] | None = None,
    negative_prompt: str | None = None,
  ) -> np.ndarray:
    """Draws images; image k is a function of (seed, k) and its label and prompt.

    Args:
      num_samples: number of images; by default one for each prompt.
      seed: seed of the noise.
      labels: classes to draw in turn, -1 for no class; by default all classes, so that they are balanced.
      steps: sampling steps per image; by default the number that the model is trained for.
      sampler: a name in `samplers.SAMPLERS`; by default the one that the model is trained for.
      guidance: the weight W of classifier-free guidance, x + W (x - x without a class), for models that were trained with
        label dropout or take the weight as an input; 0 for no guidance, which is the default unless the smallest weight
        that the model takes is larger. Other software often calls 1 + W the guidance scale.
      guidance_interval: noise levels sigma / alpha, (low, high), between which steps are guided; None for all.
      prompts: what to draw in turn, for models that are conditioned on text.
      guiding_model: the folder of a weaker model, a stage, or a workdir, whose predictions take the place of those without a
        class (autoguidance); any model can be guided in this way.
      negative_prompt: what guidance leads away from, in place of the empty text.

    Returns:
      (num_samples, H, W, C) uint8.

    Raises:
      UserError: the sampler or a label does not exist, a number is out of range, the model's schedule has no grid with
        this number of steps, the model cannot be guided, or prompts are missing or not possible, or a negative prompt has no effect.
    """
    chosen = self.check_labels(labels)
    num_samples = len(prompts or ()) if num_samples is None else num_samples
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
    weight = asked_weight('guidance', guidance, self.stored.denoise.conditioning)
    try:
      by = make_guidance(weight, guidance_interval or ())
    except ValueError as error:
      raise UserError(f'guidance={weight}, guidance_interval={guidance_interval}: {error}') from error
    by_model = read_guiding(self.stored, 'guiding_model', guiding_model, by)
    takes, labelled = self.stored.denoise.conditioning, (chosen or {}).get('label')
    check('guidance', by, takes, self.stored.cond_dropout, labelled, by_model is not None)
    if negative_prompt is not None:
      check_negative(self.stored, bool(by), by_model is not None, 'negative_prompt', 'guidance')
    chosen = with_texts(self.stored, chosen, prompts or (), bool(by), negative_prompt, 'prompts')
    size = batch_size(self.stored, min(_BATCH, num_samples), num_samples)
    draw = self.drawer(cls(), self.stored.clip_x, size, by, by_model)
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
    self,
    sampler: samplers.Sampler,
    clip_x: bool,
    batch_size: int,
    guidance: Guidance = NONE,
    guiding: GuidingModel | None = None,
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
      guiding=guiding,
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
  return LoadedModel(model.read(model_folders.find(paths.on_disk('load: path', path))))


def read_guiding(
  stored: StoredModel, key: str, path: str | os.PathLike[str] | None, guidance: Guidance
) -> GuidingModel | None:
  """Returns the guiding model at `path`, which `key` names; None without a path.

  Raises:
    UserError: there is no guidance, or see `guiding_models.read`.
  """
  if path is None:
    return None
  if not guidance:
    raise UserError(f'{key}={os.fspath(path)} only applies to a guidance above 0')
  return guiding_models.read(key, path, stored.denoise.conditioning, stored.space, stored.image_shape)


def batch_size(stored: StoredModel, most: int, num_samples: int) -> int:
  """Returns how many images to draw at a time: `most`, unless they are large, because a network decodes them."""
  return at_a_time(stored.space, stored.image_shape, most, num_samples)


def with_texts(
  stored: StoredModel,
  chosen: Chosen,
  prompts: Sequence[str],
  guided: bool,
  negative: str | None = None,
  name: str = '--prompts',
) -> Chosen:
  """Returns what to draw in turn, for a `Drawer`: `chosen`, and the embeddings of the prompts if there are any.

  Args:
    stored: the model.
    chosen: the classes to draw.
    prompts: the texts; none for a model without a text encoder.
    guided: whether to embed the text as well that guidance compares with.
    negative: this text, see `check_negative`; None for the empty text.
    name: the start of the error messages, such as the flag.

  Raises:
    UserError: the model takes no text, or needs one; see also `TextEncoder.embed`.
  """
  if not conditioning.takes_text(stored.denoise.conditioning):
    if prompts:
      raise UserError(f'{name}: {_name(stored)} is not conditioned on text')
    return chosen
  if not prompts:
    raise UserError(f'{name}: this model draws what a text says, and none was given')
  if stored.text is None:
    raise UserError(f'{name}: this model has no text encoder; call `denoise` with embeddings instead')
  found: dict[str, Any] = {**(chosen or {}), 'text': stored.text.embed(prompts)}
  return found | ({NONE_OF + 'text': stored.text.embed([negative or ''])} if guided else {})


def check_negative(stored: StoredModel, guided: bool, by_model: bool, name: str, guidance: str) -> None:
  """Raises UserError if a negative prompt has no effect.

  Args:
    stored: the model.
    guided: whether it is guided.
    by_model: whether a guiding model guides it, in place of its predictions for the empty text.
    name: the start of the error messages, such as the flag.
    guidance: what the weight of guidance is called.
  """
  takes = stored.denoise.conditioning
  if not conditioning.takes_text(takes):
    raise UserError(f'{name}: {_name(stored)} is not conditioned on text')
  if conditioning.weights(takes) is not None or not stored.cond_dropout:
    raise UserError(
      f'{name}: this model makes no call that guidance leads away from: it was distilled without the empty text, or takes '
      'the weight of guidance as an input; leave the text out'
    )
  if by_model:
    raise UserError(
      f'{name}: a guiding model receives the same text as the model that it guides; leave one of them out'
    )
  if not guided:
    raise UserError(
      f'{name}: guidance leads away from this text, and there is none; add {guidance}, for example 6.5'
    )


def _name(stored: StoredModel) -> str:
  return str(stored.provenance.get('stage', 'the model'))


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
