"""Reads Stable Diffusion 1.x and 2.x from folders of diffusers: JSON and safetensors, never executed.

FOLDER/model_index.json
FOLDER/unet/          config.json, diffusion_pytorch_model.safetensors   UNet2DConditionModel
FOLDER/vae/           config.json, diffusion_pytorch_model.safetensors   AutoencoderKL
FOLDER/text_encoder/  config.json, model.safetensors                     CLIPTextModel
FOLDER/tokenizer/     vocab.json and merges.txt, or tokenizer.json
FOLDER/scheduler/     scheduler_config.json
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, diffusers_config
from diffusion_distillation.interop import stable_diffusion_config as keys
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Latents
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition
from diffusion_distillation.stages.companions import abstract_params, read_tokenizer
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

_log = logging.getLogger(__name__)

TEXT_WEIGHTS = 'model.safetensors'
PREFIX = 'text_model.'  # of the names of published text encoders
_BUFFERS = ('embeddings.position_ids',)  # 0, 1, 2, ...
_PARTS = ('unet', 'vae', 'text_encoder', 'tokenizer', 'scheduler')
_NOT_READ = ('safety_checker', 'feature_extractor')
_SPACINGS = ('leading', 'linspace', 'trailing')
_TEXT_DROPOUT = 0.1  # of Stable Diffusion's training (Rombach et al.'s model cards)


def read(folder: pathlib.Path, num_steps: int) -> StoredModel:
  """Reads a pipeline folder, to be sampled by DDIM in `num_steps` steps as diffusers' pipeline does.

  The pipeline's own corrections apply: steps_offset is 1, and x is not clipped. The safety checker is not read.

  Raises:
    UserError: the folder is not such a pipeline, or is not supported; the message names the key or the weight.
  """
  _check_index(folder / 'model_index.json')
  schedule, output, times = _schedule(folder / 'scheduler' / 'scheduler_config.json')
  # All descriptions first: the weights take long to read.
  network, unet_weights = read_unet(folder / 'unet', schedule)
  vae, vae_weights = read_vae(folder / 'vae')
  text, text_weights = read_text_encoder(folder / 'text_encoder')
  if vae.latent_channels != network.out_ch:
    raise UserError(
      f'{folder}: the vae has latent_channels={vae.latent_channels}, but the unet has out_channels={network.out_ch}'
    )
  if text.hidden_size != network.cross_attention_dim:
    raise UserError(
      f'{folder}: the text_encoder has hidden_size={text.hidden_size}, but the unet has '
      f'cross_attention_dim={network.cross_attention_dim}'
    )
  network = network.clone(text_length=text.max_position_embeddings)
  sides = diffusers.image_size(
    folder / 'unet' / 'config.json', diffusers_config.read_json(folder / 'unet' / 'config.json')
  )
  shape = (*(vae.factor * side for side in sides), vae.in_channels)
  try:
    network.check((*sides, network.out_ch))
  except ValueError as error:
    raise UserError(f'{folder / "unet" / "config.json"}: {error}') from error
  for part, name in (
    *((part, diffusers.WEIGHTS) for part in ('unet', 'vae')),
    ('text_encoder', TEXT_WEIGHTS),
  ):
    diffusers.weights_file(folder / part, name)
  vae_params, text_params = vae_weights(), text_weights()
  tokenizer = read_tokenizer(folder / 'tokenizer')
  if not tokenizer:
    _log.warning('%s: there is no tokenizer, so that the model cannot be given prompts', folder)
  return StoredModel(
    denoise=Denoiser(network, output).without_dropout(),
    params=unet_weights(),
    schedule=schedule,
    space=Latents(vae, digest(vae_params), lambda: vae_params),
    image_shape=shape,
    sampler='ddim',
    num_steps=num_steps,
    times=times,
    clip_x=False,
    cond_dropout=_TEXT_DROPOUT,
    text=TextEncoder(text, digest(text_params), lambda: text_params, tokenizer),
  )


def _check_index(path: pathlib.Path) -> None:
  """Raises UserError unless the pipeline has the parts of Stable Diffusion and no others."""
  index = diffusers_config.read_json(path)
  parts = [  # a part is [library, class]; an absent one has nulls
    key
    for key, value in index.items()
    if not key.startswith('_') and isinstance(value, list) and any(value)
  ]
  name = brief(index.get('_class_name'))
  for part in _PARTS:
    if part not in parts and part != 'tokenizer':
      raise UserError(
        f'{path}: the pipeline {name} has no {part}; a Stable Diffusion pipeline is expected'
      )
  if others := [part for part in parts if part not in (*_PARTS, *_NOT_READ)]:
    raise UserError(
      f'{path}: the pipeline {name} has a part {others[0][:80]!r}, which is not supported; supported: {", ".join(_PARTS)}'
    )


def _schedule(path: pathlib.Path) -> tuple[Discrete, str, str]:
  """Returns the schedule, the output that the network predicts, and the grid of the sampling steps."""
  settings = diffusers_config.read_json(path)
  schedule, output = diffusers.read_schedule(path, settings)
  to_one = settings.get('set_alpha_to_one', settings.get('_class_name') != 'PNDMScheduler')
  if not isinstance(to_one, bool):
    raise diffusers.refuse(path, 'set_alpha_to_one', to_one, ('true', 'false'))
  spacing = settings.get('timestep_spacing', 'leading')
  if spacing not in _SPACINGS:
    raise diffusers.refuse(path, 'timestep_spacing', spacing, _SPACINGS)
  of_leading = 'leading' if to_one else 'leading_to_first'
  grid = 'uniform' if spacing == 'trailing' else of_leading
  return dataclasses.replace(schedule, steps_offset=1), output, grid


def unet_of(path: pathlib.Path, config: Mapping[str, Any], schedule: Schedule) -> UNet2DCondition:
  """Builds the U-Net that `config`, the content of the file `path`, describes.

  Raises:
    UserError: a key is not supported, or its value is not valid; the message names it.
  """
  keys.check(path, config, keys.UNET, keys.UNET_ONLY, keys.UNET_IGNORED)
  channels, outputs = config.get('in_channels', 4), config.get('out_channels', 4)
  if outputs != channels:
    raise UserError(
      f'{path}: in_channels={channels} for out_channels={outputs} is not supported: the network must receive noise alone, '
      'no mask and no image'
    )
  return UNet2DCondition(
    **_fields({**keys.UNET_DEFAULTS, **config}, keys.UNET_FIELDS),
    out_ch=outputs,
    num_classes=config.get('num_class_embeds') or 0,
    schedule=schedule,
  )


def vae_of(path: pathlib.Path, config: Mapping[str, Any]) -> AutoencoderKL:
  """Builds the autoencoder that `config` describes; see `unet_of`."""
  keys.check(path, config, keys.VAE, keys.VAE_ONLY, keys.VAE_IGNORED)
  return _checked(path, AutoencoderKL(**_fields(config, keys.VAE)))


def text_encoder_of(path: pathlib.Path, config: Mapping[str, Any]) -> CLIPText:
  """Builds the text encoder that `config` describes; see `unet_of`."""
  keys.check(path, config, keys.TEXT, keys.TEXT_ONLY)
  return _checked(path, CLIPText(**_fields(config, keys.TEXT)))


def _fields(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of those keys that are fields of a network."""
  given = {key: value for key, value in config.items() if key in known}
  return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _checked(path: pathlib.Path, network: Any) -> Any:
  try:
    network.check()
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error
  return network


def abstract_unet(network: UNet2DCondition) -> Params:
  """Returns shapes of the parameters of a U-Net, without computing them."""
  side = 2 ** (len(network.block_out_channels) - 1)
  cond = conditioning.zeros(network.conditioning, 1)
  z, logsnr = jnp.zeros((1, side, side, network.out_ch)), jnp.zeros(1)
  found = jax.eval_shape(lambda rng: network.init(rng, z, logsnr, cond), jax.random.key(0))
  return found['params']


def read_unet(folder: pathlib.Path, schedule: Schedule) -> tuple[UNet2DCondition, Callable[[], Params]]:
  """Reads the description of a UNet2DConditionModel, and returns a function that reads its parameters, float32.

  Raises:
    UserError: it is not supported, or a file is missing or damaged; the message names the key or the weight. The function raises
      it, too.
  """
  path = folder / 'config.json'
  network = unet_of(path, diffusers_config.read_json(path), schedule)
  side = 2 ** (len(network.block_out_channels) - 1)
  try:
    network.check((side, side, network.out_ch))
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error
  return network, lambda: _unet_weights(folder, network)


def _unet_weights(folder: pathlib.Path, network: UNet2DCondition) -> Params:
  layers = (network.layers_per_block, network.transformer_layers_per_block)
  counts = {
    'layers_per_block': _most(layers[0]),
    'transformer_layers_per_block': _most(layers[1]),
  }
  sizes = {
    'block_out_channels': max(network.block_out_channels),
    'cross_attention_dim': network.cross_attention_dim,
    'time_embedding_dim': network.time_embedding_dim or 0,
    'num_class_embeds': network.num_classes,
  }
  weights = diffusers.weights_file(folder)
  found = diffusers.load_state(weights)
  _check_size(weights, found, counts, sizes)
  return diffusers.convert(found, abstract_unet(network), weights)


def read_vae(folder: pathlib.Path) -> tuple[AutoencoderKL, Callable[[], Params]]:
  """Reads an AutoencoderKL; see `read_unet`."""
  path = folder / 'config.json'
  network = vae_of(path, diffusers_config.read_json(path))
  return network, lambda: _vae_weights(folder, network)


def _vae_weights(folder: pathlib.Path, network: AutoencoderKL) -> Params:
  weights = diffusers.weights_file(folder)
  found = diffusers.load_state(weights)
  counts = {'layers_per_block': network.layers_per_block}
  sizes = {'block_out_channels': max(network.block_out_channels)}
  _check_size(weights, found, counts, sizes)
  return diffusers.convert(found, abstract_params(network), weights)


def read_text_encoder(folder: pathlib.Path) -> tuple[CLIPText, Callable[[], Params]]:
  """Reads a CLIPTextModel; see `read_unet`."""
  path = folder / 'config.json'
  network = text_encoder_of(path, diffusers_config.read_json(path))
  return network, lambda: _text_weights(folder, network)


def _text_weights(folder: pathlib.Path, network: CLIPText) -> Params:
  weights = diffusers.weights_file(folder, TEXT_WEIGHTS)
  named = {name.removeprefix(PREFIX): value for name, value in diffusers.load_state(weights).items()}
  found = {name: value for name, value in named.items() if name not in _BUFFERS}
  counts = {'num_hidden_layers': network.num_hidden_layers}
  sizes = {
    key: getattr(network, key)
    for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'max_position_embeddings')
  }
  _check_size(weights, found, counts, sizes)
  return diffusers.convert(found, abstract_params(network), weights)


def _most(value: int | tuple[int, ...]) -> int:
  return max(value) if isinstance(value, tuple) else value


def _check_size(
  path: pathlib.Path,
  found: Mapping[str, np.ndarray],
  counts: Mapping[str, int],
  sizes: Mapping[str, int],
) -> None:
  """Raises UserError for a network that is deeper or wider than the weights, because tracing it may take very long."""
  widest = max((size for value in found.values() if value.size for size in value.shape), default=0)
  for wanted, most in ((counts, len(found)), (sizes, widest)):
    for key, value in wanted.items():
      if value > most:
        raise UserError(f'{path}: {key} ({value}) asks for more than the weights have ({most})')
