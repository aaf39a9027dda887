"""Whether a run is measured, what its samples are compared with and, for models of texts, which texts they are drawn for."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

from diffusion_distillation import datasets, paths
from diffusion_distillation.config import Config
from diffusion_distillation.datasets import caption_files
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.prompted import NOT_ASKED, Prompted
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.interop import clip
from diffusion_distillation.stages import workdir
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.texts import TextEncoder

_log = logging.getLogger(__name__)


def read(config: Config) -> Prompted:
  """Reads the prompts and the CLIP model that a config names, if it names them.

  Raises:
    UserError: see `caption_files.read_prompts` and `clip.read`.
  """
  section, found = config.evaluation, NOT_ASKED
  if config.evaluation.prompts:
    path = paths.on_disk('evaluation.prompts', section.prompts)
    prompts = caption_files.read_prompts(path, 'evaluation.prompts')
    found = Prompted(path.name, prompts, None)
  return dataclasses.replace(found, clip=clip.read(section.clip)) if section.clip else found


def is_measured(config: Config) -> bool:
  """Whether the stages of a run are measured: its dataset has images to compare samples with, or there is a CLIP model."""
  return datasets.has_images(config.dataset.name) or bool(config.evaluation.clip)


def check(config: Config, encoder: TextEncoder | None) -> Prompted:
  """Returns the prompts and the CLIP model of an evaluation, without prompts if it draws captions; before anything is trained.

  Args:
    config: the config of the run.
    encoder: the text encoder of its models; None if they take no texts.

  Raises:
    UserError: the config names prompts or a CLIP model, and nothing is drawn or measured with them; there are no texts, or too
      few prompts; a file cannot be read; or a tokenizer is missing.
  """
  section, name = config.evaluation, config.dataset.name
  for key, value in (('prompts', section.prompts), ('clip', section.clip)):
    if value and encoder is None:
      raise UserError(
        f'evaluation.{key}={value} only applies to models that draw what a text says, and to --mode=evaluate with --images; '
        'leave it out'
      )
  if section.prompts and not is_measured(config):
    raise UserError(
      f'evaluation.prompts={section.prompts}: dataset.name={name} has no images to compare samples with, so that this run is only '
      'measured with evaluation.clip=FOLDER; name a CLIP model, or leave the prompts out'
    )
  if section.clip and name == datasets.NONE and not section.prompts:
    raise UserError(
      f'evaluation.clip={section.clip}: dataset.name=none has no texts to draw; name evaluation.prompts=FILE'
    )
  if encoder is None or not is_measured(config):
    return NOT_ASKED
  tokenize, asked = encoder.tokenize(), read(config)
  if asked.clip is not None:
    asked.clip.text.tokenize()
  if asked.prompts:
    asked = asked.first(section.num_samples)
    tokenize(asked.prompts, warns=False)
  if tokenize.cut:
    _log.warning(
      '%s: %d of %d prompts are too long for the text encoder and are cut',
      *(asked.file, tokenize.cut, len(asked.prompts)),
    )
  return asked


class Compared(NamedTuple):
  """What the samples of a run are compared with.

  Attributes:
    config: the config with which the images are opened.
    images: the training images; None for a dataset without images.
    texts: what models of texts draw; None for other models, and if they are not measured.
  """

  config: Config
  images: Loader | None
  texts: SampledTexts | None

  @property
  def is_measured(self) -> bool:
    """Whether the stages are measured."""
    return self.images is not None or self.texts is not None

  def drawing_for(self, encoder: TextEncoder | None) -> 'Compared':
    """Returns the same with another text encoder, for a run that has just trained its own."""
    if self.texts is None or encoder is None:
      return self
    return self._replace(texts=dataclasses.replace(self.texts, encoder=encoder))


def of_run(
  config: Config, stages: Sequence[Stage], images: Loader | None, captions: Captions | None
) -> Compared:
  """Returns what the samples of a run are compared with; no image is read yet.

  Args:
    config: the config of the run.
    stages: its stages.
    images: the training images of `workdir.plan_for`; None for a run of texts.
    captions: the texts of `workdir.open_captions`; None if there are none.

  Raises:
    UserError: see `check` and `workdir.compared_images`.
  """
  encoder = stages[0].text
  asked, (opened, found) = check(config, encoder), workdir.compared_images(config, images)
  if encoder is None or not is_measured(config):
    return Compared(opened, found, None)
  return Compared(
    opened, found, SampledTexts(encoder, captions if found is None else found.images, asked)
  )
