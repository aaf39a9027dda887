"""The format `diffusers` for models of texts: a folder that StableDiffusionPipeline loads.

Nothing is drawn to check it: the files are read again, and every weight, hyper-parameter, timestep and token must be equal.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import StorageError
from diffusion_distillation.interop import diffusers, diffusers_writer, model_card, stable_diffusion
from diffusion_distillation.interop import stable_diffusion_config as keys
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.spaces import Latents
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition
from diffusion_distillation.stages.model import StoredModel, network_arguments
from diffusion_distillation.stages.texts import MERGES, VOCABULARY, TextEncoder
from diffusion_distillation.system.checkpoints import digest

FILES = {
  'model_index.json': 'the pipeline: `StableDiffusionPipeline`, without a safety checker',
  'unet/': 'the network of the latents: its config and weights',
  'vae/': 'the autoencoder between images and latents',
  'text_encoder/, tokenizer/': 'the networks of the texts',
  'scheduler/': 'the noise schedule and the timesteps',
}
_DDIM = ('ddim', 'ddim_keep_eps')  # the same where x is not clipped
_RENOISED = 'multistep_consistency'
_TOKENIZER_CONFIG = 'tokenizer_config.json'
_TEXTS = ('', 'A photo of 2 large red circles; on blue.')  # whose tokens are compared
_DISTILLED = """
The model was distilled for this number of steps and draws without guidance: set `guidance_scale=0`, because the pipeline's default is 7.5.
"""
_USAGE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained('.')
image = pipeline('a lighthouse at dusk', num_inference_steps=STEPS, guidance_scale=SCALE).images[0]
```
NOTE
The images of a seed differ from those of other programs, which draw other noise from it.
"""


def usage(description: Mapping[str, Any]) -> str:
  """Returns instructions for drawing the model's images, in Markdown; `description` is the contents of model.json."""
  distilled = bool(model_card.origin(description['provenance']).get('parent'))
  text = _USAGE.replace('STEPS', str(description['num_steps']))
  return text.replace('SCALE', '0' if distilled else '7.5').replace('NOTE', _DISTILLED * distilled)


def write(stored: StoredModel, folder: pathlib.Path) -> None:
  """Writes a pipeline folder and reads it again.

  Raises:
    UserError: a part of the model cannot be expressed in diffusers; the message names it.
    StorageError: the files differ from the model.
  """
  space, text = stored.space, stored.text
  if problems := _problems(stored):
    raise diffusers_writer.refuse('; '.join(problems), elsewhere='')
  assert isinstance(space, Latents) and text is not None
  scheduler = _scheduler(stored)
  contents: dict[str, Any] = {
    'model_index.json': _index(scheduler['_class_name'], text),
    'unet/config.json': _unet(stored),
    'vae/config.json': {'_class_name': 'AutoencoderKL', **_values(space.vae, keys.VAE)}
    | {'sample_size': max(stored.image_shape[:2])},
    'text_encoder/config.json': _special_tokens(text)
    | {'architectures': ['CLIPTextModel'], 'model_type': 'clip_text_model'}
    | _values(text.network, keys.TEXT),
    'scheduler/scheduler_config.json': scheduler,
  }
  for name, content in contents.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2) + '\n')
  _save(diffusers.state_dict(stored.params), folder / 'unet' / diffusers.WEIGHTS)
  _save(diffusers.state_dict(space.weights()), folder / 'vae' / diffusers.WEIGHTS)
  named = diffusers.state_dict(text.weights()).items()
  published = {f'{stable_diffusion.PREFIX}{name}': value for name, value in named}
  _save(published, folder / 'text_encoder' / stable_diffusion.TEXT_WEIGHTS)
  (folder / 'tokenizer').mkdir()
  for name, content in _tokenizer(text).items():
    (folder / 'tokenizer' / name).write_bytes(content)
  _compare(stored, stable_diffusion.read(folder, stored.num_steps))


def _problems(stored: StoredModel) -> list[str]:
  """Returns the parts of a model that StableDiffusionPipeline lacks, in words."""
  network, found = stored.denoise.network, []
  if not isinstance(network, UNet2DCondition):
    found.append(f'the network {type(network).__name__} is not a UNet2DConditionModel')
  elif network.num_classes:
    found.append(
      'the network takes classes beside texts, which StableDiffusionPipeline does not pass on'
    )
  elif network.guidance:
    found.append(
      'the network takes the weight of guidance as an input, which StableDiffusionPipeline does not pass on'
    )
  if not isinstance(stored.space, Latents) or not isinstance(stored.space.vae, AutoencoderKL):
    found.append('the space has no AutoencoderKL')
  if stored.denoise.output not in diffusers.PREDICTIONS:
    found.append(f'a network that predicts {stored.denoise.output} has no prediction_type')
  if stored.sampler not in (*_DDIM, _RENOISED):
    found.append(f'the sampler {stored.sampler} is neither DDIM nor {_RENOISED}')
  if stored.text is None or not stored.text.tokenizer:
    found.append('the model has no text encoder with a tokenizer')
  return found


def _scheduler(stored: StoredModel) -> dict[str, Any]:
  """Returns scheduler_config.json, with the timesteps of the model's grid.

  StableDiffusionPipeline sets `steps_offset` to 1 and `clip_sample` to False if they differ.
  """
  assert isinstance(stored.schedule, Discrete)  # as every UNet2DCondition has
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  schedule = dataclasses.replace(stored.schedule, steps_offset=1)
  found = diffusers_writer.scheduler(schedule, stored.denoise.output, grid, False, to_first=True)
  if stored.sampler != _RENOISED or stored.num_steps == 1:
    return found
  if found['timestep_spacing'] != 'trailing':
    raise diffusers_writer.refuse(
      'LCMScheduler cannot represent a grid that is not uniform', elsewhere=''
    )
  # Of these many original steps, LCMScheduler takes all: 999, 749, 499 and 249 for four.
  return found | {'_class_name': 'LCMScheduler', 'original_inference_steps': stored.num_steps}


def _index(scheduler: str, text: TextEncoder) -> dict[str, Any]:
  from_files = {VOCABULARY, MERGES} <= text.tokenizer.keys()
  return {
    '_class_name': 'StableDiffusionPipeline',
    'feature_extractor': [None, None],
    'image_encoder': [None, None],
    'requires_safety_checker': False,
    'safety_checker': [None, None],
    'scheduler': ['diffusers', scheduler],
    'text_encoder': ['transformers', 'CLIPTextModel'],
    'tokenizer': ['transformers', 'CLIPTokenizer' if from_files else 'CLIPTokenizerFast'],
    'unet': ['diffusers', 'UNet2DConditionModel'],
    'vae': ['diffusers', 'AutoencoderKL'],
  }


def _special_tokens(text: TextEncoder) -> dict[str, int]:
  """Returns the first token of every text, and the one that texts are padded with."""
  tokens = text.tokens([''])[0]
  return {'bos_token_id': int(tokens[0]), 'pad_token_id': int(tokens[-1])}


def _values(network: Any, known: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the hyper-parameters of a network that a config file of diffusers or transformers has."""
  found = {key: getattr(network, key) for key in known if hasattr(network, key)}
  return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _unet(stored: StoredModel) -> dict[str, Any]:
  network, shape = stored.denoise.network, stored.space.shape(stored.image_shape)
  height, width, channels = shape
  return {
    '_class_name': 'UNet2DConditionModel',
    'sample_size': height if height == width else [height, width],
    'in_channels': channels,
    'out_channels': channels,
    **_values(network, keys.UNET_FIELDS),
  }


def _tokenizer(text: TextEncoder) -> dict[str, bytes]:
  """Returns the files of the tokenizer, to which the number of tokens is added if they lack it."""
  found = dict(text.tokenizer)
  settings = json.loads(found[_TOKENIZER_CONFIG]) if _TOKENIZER_CONFIG in found else {}
  length = text.network.max_position_embeddings
  if not isinstance(settings, dict) or settings.get('model_max_length') != length:
    settings = {'tokenizer_class': 'CLIPTokenizer', **settings, 'model_max_length': length}
    found[_TOKENIZER_CONFIG] = (json.dumps(settings, indent=2) + '\n').encode()
  return found


def _save(state: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
  safetensors.numpy.save_file(dict(state), path, {'format': 'pt'})


def _compare(stored: StoredModel, found: StoredModel) -> None:
  """Raises StorageError unless the files hold what the model does."""
  assert isinstance(stored.space, Latents) and isinstance(found.space, Latents)
  assert isinstance(stored.schedule, Discrete) and isinstance(found.schedule, Discrete)
  assert stored.text is not None and found.text is not None

  def same(of: Callable[[StoredModel], Any]) -> bool:
    return bool(np.array_equal(of(stored), of(found)))

  def arguments(of: StoredModel) -> str:
    return repr(sorted(network_arguments(of.denoise.network).items()))

  def grid(of: StoredModel) -> np.ndarray:
    return times.make_grid(of.times, stored.num_steps, of.schedule)

  def tokens(of: StoredModel) -> np.ndarray:
    assert of.text is not None
    return of.text.tokens(_TEXTS)

  agree = {
    'weights of the unet': same(lambda of: digest(of.params)),
    'config of the unet': same(arguments) and same(lambda of: of.denoise.output),
    'vae': stored.space == found.space,
    'text encoder': stored.text == found.text,
    'image size': same(lambda of: of.image_shape),
    'schedule': np.array_equal(stored.schedule.logsnr, found.schedule.logsnr),
    'timesteps': same(grid),
    'tokens': same(tokens),
  }
  if differing := [name for name, equal in agree.items() if not equal]:
    raise StorageError(
      f'the exported files differ from the model ({", ".join(differing)}); nothing was kept'
    )
