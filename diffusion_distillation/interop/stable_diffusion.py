"""Reads the networks of Stable Diffusion 1.x and 2.x from folders of diffusers: JSON and safetensors, never executed.

FOLDER/model_index.json
FOLDER/unet/          config.json, diffusion_pytorch_model.safetensors   UNet2DConditionModel
FOLDER/vae/           config.json, diffusion_pytorch_model.safetensors   AutoencoderKL
FOLDER/text_encoder/  config.json, model.safetensors                     CLIPTextModel
FOLDER/tokenizer/     vocab.json and merges.txt, or tokenizer.json
FOLDER/scheduler/     scheduler_config.json
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion.schedules import Schedule
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, diffusers_config
from diffusion_distillation.interop import stable_diffusion_config as keys
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition
from diffusion_distillation.training.state import Params

TEXT_WEIGHTS = 'model.safetensors'
_PREFIX = 'text_model.'  # of the names of published text encoders
_BUFFERS = ('embeddings.position_ids',)  # 0, 1, 2, ...


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
  return _abstract(lambda rng: network.init(rng, z, logsnr, cond))


def abstract_vae(network: AutoencoderKL) -> Params:
  """Returns shapes of the parameters of an autoencoder, without computing them."""
  image = jnp.zeros((1, network.factor, network.factor, network.in_channels))
  return _abstract(lambda rng: network.init(rng, image))


def abstract_text_encoder(network: CLIPText) -> Params:
  """Returns shapes of the parameters of a text encoder, without computing them."""
  return _abstract(lambda rng: network.init(rng, jnp.zeros((1, 1), jnp.int32)))


def _abstract(init: Callable[[jax.Array], Any]) -> Params:
  return jax.eval_shape(init, jax.random.key(0))['params']


def read_unet(folder: pathlib.Path, schedule: Schedule) -> tuple[UNet2DCondition, Params]:
  """Reads a UNet2DConditionModel and its parameters, float32.

  Raises:
    UserError: it is not supported, or a file is missing or damaged; the message names the key or the weight.
  """
  path = folder / 'config.json'
  network = unet_of(path, diffusers_config.read_json(path), schedule)
  side = 2 ** (len(network.block_out_channels) - 1)
  try:
    network.check((side, side, network.out_ch))
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error
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
  return network, diffusers.convert(found, abstract_unet(network), weights)


def read_vae(folder: pathlib.Path) -> tuple[AutoencoderKL, Params]:
  """Reads an AutoencoderKL and its parameters, float32; raises UserError as `read_unet` does."""
  path = folder / 'config.json'
  network = vae_of(path, diffusers_config.read_json(path))
  weights = diffusers.weights_file(folder)
  found = diffusers.load_state(weights)
  counts = {'layers_per_block': network.layers_per_block}
  sizes = {'block_out_channels': max(network.block_out_channels)}
  _check_size(weights, found, counts, sizes)
  return network, diffusers.convert(found, abstract_vae(network), weights)


def read_text_encoder(folder: pathlib.Path) -> tuple[CLIPText, Params]:
  """Reads a CLIPTextModel and its parameters, float32; raises UserError as `read_unet` does."""
  path = folder / 'config.json'
  network = text_encoder_of(path, diffusers_config.read_json(path))
  weights = diffusers.weights_file(folder, TEXT_WEIGHTS)
  named = {name.removeprefix(_PREFIX): value for name, value in diffusers.load_state(weights).items()}
  found = {name: value for name, value in named.items() if name not in _BUFFERS}
  counts = {'num_hidden_layers': network.num_hidden_layers}
  sizes = {
    key: getattr(network, key)
    for key in ('vocab_size', 'hidden_size', 'intermediate_size', 'max_position_embeddings')
  }
  _check_size(weights, found, counts, sizes)
  return network, diffusers.convert(found, abstract_text_encoder(network), weights)


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
