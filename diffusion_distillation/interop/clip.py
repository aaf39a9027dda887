"""Reads CLIP from folders of transformers: JSON and safetensors, never executed.

FOLDER/config.json               CLIPModel: text_config, vision_config, projection_dim
FOLDER/model.safetensors
FOLDER/preprocessor_config.json  CLIPImageProcessor; its defaults apply where the file is missing
FOLDER/vocab.json, merges.txt    or tokenizer.json
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.clip_score import Clip, Preprocessing
from diffusion_distillation.interop import diffusers, diffusers_config, stable_diffusion
from diffusion_distillation.interop import stable_diffusion_config as keys
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.interop.diffusers_config import BOOL, COUNT, INT, POSITIVE, WORD, Kind
from diffusion_distillation.networks.clip_vision import CLIPVision
from diffusion_distillation.stages.companions import abstract_params, read_tokenizer
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

_TEXT, _VISION = 'text_model.', 'vision_model.'
_TEXT_PROJECTION, _VISUAL_PROJECTION = 'text_projection.weight', 'visual_projection.weight'
_BUFFERS = ('embeddings.position_ids',)
_NOT_READ = ('logit_scale',)  # the score is a cosine
# Keys of vision_config that are also fields of `CLIPVision`.
_FIELDS = {
  'hidden_size': COUNT,
  'intermediate_size': COUNT,
  'num_hidden_layers': COUNT,
  'num_attention_heads': COUNT,
  'num_channels': COUNT,
  'image_size': COUNT,
  'patch_size': COUNT,
  'hidden_act': WORD,
  'layer_norm_eps': POSITIVE,
}
_ONLY: dict[str, tuple[Any, ...]] = {'model_type': ('clip_vision_model',)}
_CHANNELS = Kind(
  'a list of three numbers',
  lambda value: (
    isinstance(value, list)
    and len(value) == 3
    and all(isinstance(number, int | float) and abs(number) < 1e3 for number in value)
  ),
)
_PROCESSOR = {
  'resample': INT,
  'rescale_factor': POSITIVE,
  'image_mean': _CHANNELS,
  'image_std': _CHANNELS,
  **{f'do_{name}': BOOL for name in ('resize', 'center_crop', 'rescale', 'normalize', 'convert_rgb')},
}
_BICUBIC = 3  # Pillow's number


def read(given: str | os.PathLike[str], key: str = 'evaluation.clip') -> Clip:
  """Reads a CLIP model.

  Args:
    given: the folder.
    key: the config key or flag that it comes from, for messages.

  Raises:
    UserError: the folder does not exist, is not such a model, or is damaged; the message names the key or the weight.
  """
  folder = paths.on_disk(key, given)
  path = folder / 'config.json'
  if not folder.is_dir():
    raise UserError(f'{key}={os.fspath(given)}: there is no such folder; name a folder of CLIP')
  config = diffusers_config.read_json(path)
  if config.get('model_type') != 'clip':
    raise UserError(
      f'{path}: model_type={brief(config.get("model_type"))} is not supported; supported: clip'
    )
  text = stable_diffusion.text_encoder_of(path, _section(path, config, 'text_config'))
  vision = _vision_of(path, config)
  preprocessing = _preprocessing(folder / 'preprocessor_config.json', vision)
  tokenizer = read_tokenizer(folder)
  if not tokenizer:
    raise UserError(f'{folder} has no tokenizer: neither vocab.json with merges.txt nor tokenizer.json')
  weights = diffusers.weights_file(folder, stable_diffusion.TEXT_WEIGHTS)
  state = diffusers.load_state(weights)
  of_text, of_vision, projection = _parted(state, weights, vision.projection_dim, text.hidden_size)
  text_params = diffusers.convert(of_text, abstract_params(text), weights)
  vision_params = diffusers.convert(of_vision, _abstract(vision), weights)
  return Clip(
    name=folder.name,
    digest=digest({'text': text_params, 'vision': vision_params, 'projection': projection}),
    vision=vision,
    vision_params=vision_params,
    text=TextEncoder(text, digest(text_params), lambda: text_params, tokenizer),
    text_projection=projection,
    preprocessing=preprocessing,
  )


def _section(path: pathlib.Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns a part of config.json; older files repeat what differs from the defaults under another name."""
  found: dict[str, Any] = {}
  for key in (name, f'{name}_dict'):
    part = config.get(key)
    if part is not None and not isinstance(part, dict):
      raise UserError(f'{path}: {key} is not an object')
    found |= part or {}
  return {key: value for key, value in found.items() if key != 'architectures'}


def _vision_of(path: pathlib.Path, config: Mapping[str, Any]) -> CLIPVision:
  section = _section(path, config, 'vision_config')
  keys.check(path, section, _FIELDS, _ONLY)
  diffusers_config.check(path, config, {'projection_dim': COUNT})
  found = {key: section[key] for key in _FIELDS if key in section}
  network = CLIPVision(**found, projection_dim=config.get('projection_dim', 512))
  try:
    network.check()
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error
  return network


def _preprocessing(path: pathlib.Path, vision: CLIPVision) -> Preprocessing:
  """Reads what CLIPImageProcessor does; every one of its steps must be done."""
  settings = diffusers_config.read_json(path) if path.is_file() else {}
  diffusers_config.check(path, settings, _PROCESSOR)
  default, side = Preprocessing(), vision.image_size
  if not path.is_file():
    return Preprocessing(side, (side, side))
  for step in ('resize', 'center_crop', 'rescale', 'normalize'):
    if settings.get(f'do_{step}') is False:
      raise UserError(f'{path}: do_{step}=False is not supported; CLIPImageProcessor does this')
  if settings.get('resample', _BICUBIC) != _BICUBIC:
    raise UserError(
      f'{path}: resample={settings["resample"]} is not supported; supported: {_BICUBIC} (bicubic)'
    )
  size, crop = settings.get('size', default.shortest_edge), settings.get('crop_size', default.crop[0])
  edge = size.get('shortest_edge') if isinstance(size, dict) else size
  sides = (crop.get('height'), crop.get('width')) if isinstance(crop, dict) else (crop, crop)
  if not all(COUNT.holds(value) for value in (edge, *sides)):
    raise UserError(
      f'{path}: size={brief(size)} and crop_size={brief(crop)} must be a shortest_edge, and height and width'
    )
  if sides != (side, side):
    raise UserError(f'{path}: crop_size={brief(crop)}, but the network takes images of {side}x{side}')
  return Preprocessing(
    edge,  # type: ignore[arg-type]
    sides,
    settings.get('rescale_factor', default.scale),
    tuple(settings.get('image_mean', default.mean)),
    tuple(settings.get('image_std', default.std)),
  )


def _parted(
  state: Mapping[str, np.ndarray], path: pathlib.Path, projection_dim: int, text_width: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
  """Returns the weights of the text encoder and of the image encoder by their own names, and the projection of texts (D, P)."""
  of_text, of_vision = {}, {}
  for name, value in state.items():
    if name.startswith(_TEXT):
      of_text[name.removeprefix(_TEXT)] = value
    elif name.startswith(_VISION):
      of_vision[name.removeprefix(_VISION)] = value
    elif name not in (_TEXT_PROJECTION, _VISUAL_PROJECTION, *_NOT_READ):
      raise UserError(f'{path}: {name[:80]} is not a weight of CLIPModel')
  for part in (of_text, of_vision):
    for name in _BUFFERS:
      part.pop(name, None)
  projection = state.get(_TEXT_PROJECTION)
  if projection is None or projection.shape != (projection_dim, text_width):
    has = 'is missing' if projection is None else f'has shape {projection.shape}'
    raise UserError(f'{path}: {_TEXT_PROJECTION} {has}; {(projection_dim, text_width)} is expected')
  if _VISUAL_PROJECTION in state:
    of_vision[_VISUAL_PROJECTION] = state[_VISUAL_PROJECTION]
  if 'embeddings.class_embedding' in of_vision:  # the only weight that is no module's
    of_vision['embeddings.weight'] = of_vision.pop('embeddings.class_embedding')
  return of_text, of_vision, np.ascontiguousarray(projection.T)


def _abstract(network: CLIPVision) -> Params:
  """Returns shapes of the parameters of an image encoder, without computing them."""
  side = network.image_size
  image = jnp.zeros((1, side, side, network.num_channels))
  return jax.eval_shape(lambda rng: network.init(rng, image), jax.random.key(0))['params']
