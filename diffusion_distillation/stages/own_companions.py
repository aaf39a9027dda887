"""The networks beside the base that a run trains itself before it, in place of an imported model's; see `companions`.

WORKDIR/companions/vae.safetensors, vae.json                     the autoencoder; its json file is written last
WORKDIR/companions/text_encoder.safetensors, text_encoder.json   the text encoder; likewise
WORKDIR/companions/tokenizer/                                    its tokenizer, made from the captions

`run/companion_training.py` trains them. As soon as both are finished, the run continues as with an imported model.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets import PROMPTS, ImageSet
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.networks.spaces import Latents
from diffusion_distillation.stages import companions, vocabularies
from diffusion_distillation.stages.texts import TextEncoder, Tokenizer
from diffusion_distillation.system.files import read_json
from diffusion_distillation.training.autoencoding import AutoencoderSection
from diffusion_distillation.training.contrastive import TextEncoderSection
from diffusion_distillation.training.state import Params

FOLDER, VAE, TEXT_ENCODER = 'companions', 'vae.json', 'text_encoder.json'
_Network = TypeVar('_Network', Latents, TextEncoder)


class Companions(NamedTuple):
  """The networks beside a model of texts.

  Attributes:
    space: the latents of the autoencoder.
    text: the text encoder.
  """

  space: Latents
  text: TextEncoder


def are_wanted(config: Config) -> bool:
  """Whether a run trains an autoencoder and a text encoder; raises UserError if it trains only one of them."""
  found = {name: config[name].num_updates for name in ('autoencoder', 'text_encoder')}
  if len({bool(updates) for updates in found.values()}) == 2:
    zero = next(name for name, updates in found.items() if not updates)
    raise UserError(
      f'{zero}.num_updates=0: autoencoder and text encoder are trained together; set both numbers of updates, or neither'
    )
  return bool(config.autoencoder.num_updates)


def check(workdir: pathlib.Path, config: Config, is_imported: bool) -> None:
  """Raises UserError if a run cannot train the networks, because its base is imported or it has no images."""
  begin = f'autoencoder.num_updates={config.autoencoder.num_updates}'
  if is_imported:
    raise UserError(
      f'{begin}: {workdir} begins with an imported model; set it and text_encoder.num_updates to 0'
    )
  if config.dataset.name == PROMPTS:
    raise UserError(
      f'{begin} needs images with captions, and dataset.name=prompts has no images; set dataset.name=captions'
    )


def autoencoder(config: Config) -> AutoencoderSection:
  """Returns the section of the autoencoder."""
  return AutoencoderSection(**config.autoencoder)


def text_encoder(config: Config) -> TextEncoderSection:
  """Returns the section of the text encoder."""
  return TextEncoderSection(**config.text_encoder)


def find(workdir: pathlib.Path, config: Config, images: ImageSet | None) -> Companions | None:
  """Returns the networks that a run trains itself: finished ones or, before that, their description with zeros as parameters.

  Args:
    workdir: the directory of the run.
    config: the config of the run.
    images: the images with captions; None if they are not at hand, so that the networks must be finished.

  Returns:
    None if the config asks for no such networks.

  Raises:
    UserError: the config is not valid.
    DamagedError: the networks are missing, but stages were already trained with them.
  """
  if not are_wanted(config):
    return None
  latents, text = read_latents(workdir), read_text(workdir)
  if latents is not None and text is not None:
    return Companions(latents, text)
  if images is None or next(workdir.glob('*/stage.json'), None) is not None:
    raise DamagedError(
      f'{workdir / FOLDER} holds no finished autoencoder and text encoder, with which the stages were trained; restore it '
      'from a copy, or use another workdir'
    )
  return Companions(new_latents(config, images), new_text(config, images))


def read_latents(workdir: pathlib.Path) -> Latents | None:
  """Reads the autoencoder of a run; returns None if it is not finished."""
  return _read(workdir / FOLDER / VAE, companions.read_latents)


def read_text(workdir: pathlib.Path) -> TextEncoder | None:
  """Reads the text encoder of a run; returns None if it is not finished."""
  return _read(workdir / FOLDER / TEXT_ENCODER, companions.read_text)


def _read(
  path: pathlib.Path, read: Callable[[pathlib.Path, Mapping[str, Any]], _Network]
) -> _Network | None:
  if not path.is_file():
    return None
  try:
    return read(path.parent, read_json(path))
  except (KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error


def new_latents(config: Config, images: ImageSet) -> Latents:
  """Returns the description of an autoencoder that is not trained yet; raises UserError if it does not fit the images."""
  try:
    vae = autoencoder(config).network(images.image_shape[-1])
    found = Latents(vae, '', lambda: _zeros(vae))
    found.shape(images.image_shape)
  except ValueError as error:
    raise UserError(f'config.autoencoder: {error}') from error
  return found


def new_text(config: Config, images: ImageSet) -> TextEncoder:
  """Returns the description of a text encoder that is not trained yet, with the tokenizer of the images' captions."""
  section = text_encoder(config)
  files = vocabularies.make(images.all_captions() or [], section.merges)
  try:
    network = section.network(Tokenizer(files, section.length).largest + 1)
  except ValueError as error:
    raise UserError(f'config.text_encoder: {error}') from error
  return TextEncoder(network, '', lambda: _zeros(network), files)


def _zeros(network: AutoencoderKL | CLIPText) -> Params:
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), companions.abstract_params(network))
