"""The networks beside a model's own in its folder: the autoencoder of its space, and the text encoder with its tokenizer.

FOLDER/vae.safetensors           the autoencoder's parameters; `space` in model.json describes it
FOLDER/text_encoder.safetensors  the text encoder's parameters; `text` in model.json describes it
FOLDER/tokenizer/                the tokenizer's own files

They are frozen. Their parameters are read when they are first needed, and checked against the digest in model.json.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.networks.spaces import Latents, Space
from diffusion_distillation.stages.texts import TOKENIZER_FILES, TextEncoder
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

VAE, TEXT_ENCODER, TOKENIZER = 'vae.safetensors', 'text_encoder.safetensors', 'tokenizer'
_NOT_ARGUMENTS = ('parent', 'name', 'dtype')


def _arguments(network: Any) -> dict[str, Any]:
  """Returns the arguments of a network that determine its parameters."""
  names = [field.name for field in dataclasses.fields(network)]
  return {name: getattr(network, name) for name in names if name not in _NOT_ARGUMENTS}


def describe_space(space: Space) -> dict[str, Any]:
  """Returns the arguments of a space as model.json holds them."""
  if isinstance(space, Latents):
    return {'vae': _arguments(space.vae), 'digest': space.digest}
  return dataclasses.asdict(space)  # type: ignore[call-overload]


def describe_text(text: TextEncoder) -> dict[str, Any]:
  """Returns a text encoder as model.json holds it."""
  return {'arguments': _arguments(text.network), 'digest': text.digest}


def write(folder: pathlib.Path, space: Space, text: TextEncoder | None) -> None:
  """Writes the networks beside a model's own into its folder, which exists."""
  if isinstance(space, Latents):
    write_latents(folder, space)
  if text is not None:
    write_text(folder, text)


def write_latents(folder: pathlib.Path, space: Latents) -> None:
  """Writes an autoencoder into a folder, which exists."""
  _write_params(folder / VAE, space.weights(), space.digest)


def write_text(folder: pathlib.Path, text: TextEncoder) -> None:
  """Writes a text encoder and its tokenizer into a folder, which exists."""
  _write_params(folder / TEXT_ENCODER, text.weights(), text.digest)
  (folder / TOKENIZER).mkdir(exist_ok=True)
  for name, content in text.tokenizer.items():
    (folder / TOKENIZER / name).write_bytes(content)


def _write_params(path: pathlib.Path, params: Params, expected: str) -> None:
  safetensors.numpy.save_file(traverse_util.flatten_dict(params, sep='/'), path, {'digest': expected})


def read_latents(folder: pathlib.Path, arguments: Mapping[str, Any]) -> Latents:
  """Reads the space of a model in a folder from its description; the parameters are read later.

  Raises:
    DamagedError: the file of the parameters is missing.
    KeyError, TypeError, ValueError: the description is damaged.
  """
  vae = AutoencoderKL(**_tuples(arguments['vae']))
  vae.check()
  weights = _source(folder / VAE, str(arguments['digest']), vae)
  return Latents(vae, str(arguments['digest']), weights)


def read_text(folder: pathlib.Path, entry: Mapping[str, Any]) -> TextEncoder:
  """Reads the text encoder of a model in a folder from its description; raises errors as `read_latents` does."""
  network = CLIPText(**_tuples(entry['arguments']))
  network.check()
  weights = _source(folder / TEXT_ENCODER, str(entry['digest']), network)
  return TextEncoder(network, str(entry['digest']), weights, read_tokenizer(folder / TOKENIZER))


def read_tokenizer(folder: pathlib.Path) -> dict[str, bytes]:
  """Returns the files of a tokenizer by name; raises UserError if they are not readable."""
  try:
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
  except OSError as error:
    raise UserError(f'{error.filename}: {error.strerror}') from error


def _tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def _source(
  path: pathlib.Path, expected: str, network: AutoencoderKL | CLIPText
) -> Callable[[], Params]:
  """Returns a function that reads the parameters of a network in a file."""
  if not path.is_file():
    raise DamagedError(f'{path} is missing; restore it from a copy')
  return functools.partial(_read_params, path, expected, network)


@functools.lru_cache(maxsize=4)  # of two models at most, such as a teacher and its student
def _read_params(path: pathlib.Path, expected: str, network: AutoencoderKL | CLIPText) -> Params:
  """Reads parameters; raises DamagedError if the file is missing, or if their digest or a shape differs."""
  try:
    flat = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise DamagedError(f'{path} is damaged ({error}); restore it from a copy') from error
  params: Params = traverse_util.unflatten_dict(flat, sep='/')
  if digest(params) != expected:
    raise DamagedError(f'{path} does not match model.json (its digest differs); restore it from a copy')
  shapes = {name: value.shape for name, value in flat.items()}
  if differing := sorted(name for name, _ in shapes.items() ^ _shapes(network).items()):
    raise DamagedError(
      f'{path}: weight {differing[0]!r} is not one of the network in model.json, or has another shape'
    )
  return params


def _shapes(network: AutoencoderKL | CLIPText) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a network's parameters by name, without computing them."""
  found = traverse_util.flatten_dict(abstract_params(network), sep='/')
  return {name: value.shape for name, value in found.items()}


def abstract_params(network: AutoencoderKL | CLIPText) -> Params:
  """Returns shapes and dtypes of a network's parameters, without computing them."""
  if isinstance(network, CLIPText):
    example = jnp.zeros((1, 1), jnp.int32)
  else:
    example = jnp.zeros((1, network.factor, network.factor, network.in_channels))
  return jax.eval_shape(lambda rng: network.init(rng, example), jax.random.key(0))['params']
