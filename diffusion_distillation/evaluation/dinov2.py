"""DINOv2 as a feature extractor, from a weight file that the user names, for the FD-DINOv2 of Stein et al. 2023.

The file is `dinov2_vitl14_pretrain.pth` (or `_reg4_`, or another size) of the original code, or the `model.safetensors` of
transformers' Dinov2Model or Dinov2WithRegistersModel. Nothing in it is executed. The digest of the weights stands beside every number.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import image_batches, weight_files
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.given_images import Batch
from diffusion_distillation.evaluation.weight_files import Arrays
from diffusion_distillation.networks.dinov2 import (
  GRID,
  HEAD,
  PATCH,
  Dinov2,
  Size,
  interpolate_positions,
  preprocess,
)
from diffusion_distillation.system import compilation, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

KEY = 'evaluation.dinov2'
AT_ONCE = 32  # maximum number of images per device at a time, which bounds the memory
_NETWORK = 'a DINOv2 with patches of 14 pixels'
_EXPECTED = 'dinov2_vitl14_pretrain.pth, or the model.safetensors of transformers'
_SIZES = {384: 's', 768: 'b', 1024: 'l', 1536: 'g'}
_UNUSED = 'mask_token'
_TENSORS = {  # transformers' names of what is not in a block, with those of the original code
  'embeddings.cls_token': 'cls_token',
  'embeddings.mask_token': 'mask_token',
  'embeddings.register_tokens': 'register_tokens',
  'embeddings.position_embeddings': 'pos_embed',
  'embeddings.patch_embeddings.projection.weight': 'patch_embed.proj.weight',
  'embeddings.patch_embeddings.projection.bias': 'patch_embed.proj.bias',
  'layernorm.weight': 'norm.weight',
  'layernorm.bias': 'norm.bias',
}
_LAYERS = {  # the same for a block
  'layer_scale1.lambda1': 'ls1.gamma',
  'layer_scale2.lambda1': 'ls2.gamma',
  'attention.output.dense.weight': 'attn.proj.weight',
  'attention.output.dense.bias': 'attn.proj.bias',
  'mlp.weights_in.weight': 'mlp.w12.weight',
  'mlp.weights_in.bias': 'mlp.w12.bias',
  'mlp.weights_out.weight': 'mlp.w3.weight',
  'mlp.weights_out.bias': 'mlp.w3.bias',
}
_LAYER = re.compile(r'encoder\.layer\.(\d{1,4})\.(.+)')
_QKV = re.compile(r'attention\.attention\.(query|key|value)\.(weight|bias)')


class Weights(NamedTuple):
  """The weights in a file.

  Attributes:
    params: parameters of `Dinov2(size)`, float32.
    size: the size of the network.
    digest: sha256 of the state dict in float32 with the original names, without the unused mask token; the same for both forms.
  """

  params: Params
  size: Size
  digest: str


def read_weights(path: str | os.PathLike[str], flag: str) -> Weights:
  """Reads a state dict of the original code or of transformers from a .pth or .safetensors file.

  Args:
    path: the file.
    flag: the flag or config key that the path comes from, for messages.

  Raises:
    UserError: the file does not exist, is damaged, or holds other tensors; the message names them.
  """
  found, source = weight_files.read(path, flag, _EXPECTED)
  state, size = _checked(_original_names(found), source)
  return Weights(_to_params(state, size), size, digest(state))


def _original_names(found: Mapping[str, np.ndarray]) -> Arrays:
  """Returns a state dict of transformers with the names of the original code; one of the original code stays as it is."""
  renamed: Arrays = {}
  parts: dict[str, dict[str, np.ndarray]] = {}
  for name, value in found.items():
    layer = _LAYER.fullmatch(name)
    if layer is None:
      renamed[_TENSORS.get(name, name)] = value
    elif of_qkv := _QKV.fullmatch(layer[2]):
      joined = f'blocks.{layer[1]}.attn.qkv.{of_qkv[2]}'
      parts.setdefault(joined, {})[of_qkv[1]] = value
    else:
      renamed[f'blocks.{layer[1]}.{_LAYERS.get(layer[2], layer[2])}'] = value
  for joined, three in parts.items():
    if len(three) == 3 and len({value.shape for value in three.values()}) == 1 and three['key'].ndim:
      renamed[joined] = np.concatenate([three[name] for name in ('query', 'key', 'value')])
  return renamed


def _shapes(size: Size, positions: int) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of the state dict, in the layout of PyTorch, by the original name."""
  width, hidden = size.width, size.hidden
  found: dict[str, tuple[int, ...]] = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, positions, width),
    'patch_embed.proj.weight': (width, 3, PATCH, PATCH),
    'patch_embed.proj.bias': (width,),
    'norm.weight': (width,),
    'norm.bias': (width,),
  }
  if size.registers:
    found['register_tokens'] = (1, size.registers, width)
  two = {'w12': (2 * hidden, width), 'w3': (width, hidden)}
  two = two if size.gated else {'fc1': (hidden, width), 'fc2': (width, hidden)}
  dense = {'attn.qkv': (3 * width, width), 'attn.proj': (width, width)}
  dense |= {f'mlp.{name}': shape for name, shape in two.items()}
  for k in range(size.depth):
    for name in ('norm1.weight', 'norm1.bias', 'norm2.weight', 'norm2.bias', 'ls1.gamma', 'ls2.gamma'):
      found[f'blocks.{k}.{name}'] = (width,)
    for name, shape in dense.items():
      found |= {f'blocks.{k}.{name}.weight': shape, f'blocks.{k}.{name}.bias': shape[:1]}
  return found


def _checked(found: Mapping[str, np.ndarray], source: str) -> tuple[Arrays, Size]:
  """Returns the tensors in float32 and the size of the network; raises UserError unless they are those of a DINOv2."""
  given = {name: value for name, value in found.items() if name != _UNUSED}
  size, positions = _size_of(given, source)
  shapes = _shapes(size, positions)
  weight_files.check_names(given.keys(), shapes.keys(), source, _NETWORK, _EXPECTED)
  state = weight_files.to_float32(given, shapes, source, _NETWORK, _EXPECTED)
  if size.width % HEAD or math.isqrt(positions - 1) ** 2 != positions - 1:
    raise UserError(
      f'{source} has {size.width} channels and {positions} positions, so it is not {_NETWORK}; name {_EXPECTED}'
    )
  return state, size


def _size_of(given: Mapping[str, np.ndarray], source: str) -> tuple[Size, int]:
  """Returns the size of the network and the number of positions, from the shapes of a few tensors."""

  def axis(name: str, place: int, ndim: int) -> int:
    value = given.get(name)
    if value is None or value.ndim != ndim or 0 in value.shape:
      problem = f'lacks {name}' if value is None else f'has {name} of shape {value.shape}'
      raise UserError(f'{source} {problem}, so it is not {_NETWORK}; name {_EXPECTED}')
    return int(value.shape[place])

  gated = 'blocks.0.mlp.w3.weight' in given
  numbers = {name.split('.')[1] for name in given if name.startswith('blocks.')}
  size = Size(
    width=axis('cls_token', 2, 3),
    depth=len(numbers),
    hidden=axis('blocks.0.mlp.w3.weight' if gated else 'blocks.0.mlp.fc2.weight', 1, 2),
    registers=axis('register_tokens', 1, 3) if 'register_tokens' in given else 0,
    gated=gated,
  )
  return size, axis('pos_embed', 1, 3)


def _to_params(state: Arrays, size: Size) -> Params:
  """Returns the parameters of `Dinov2(size)`, with position embeddings for images of SIDE pixels."""
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for name, value in state.items():
    parts = name.split('.')
    if parts[-1] in ('weight', 'bias', 'gamma') and parts[0] != 'patch_embed':
      place = (f'block{parts[1]}', *parts[-2:]) if parts[0] == 'blocks' else (*parts,)
      if parts[-1] == 'gamma':
        flat[place[:-1]] = value
      elif parts[-1] == 'bias':
        flat[place] = value
      elif value.ndim == 1:
        flat[(*place[:-1], 'scale')] = value
      else:
        flat[(*place[:-1], 'kernel')] = np.ascontiguousarray(value.T)
  patch = state['patch_embed.proj.weight'].transpose(2, 3, 1, 0)
  flat['patch', 'kernel'] = np.ascontiguousarray(patch).reshape(-1, size.width)
  flat['patch', 'bias'] = state['patch_embed.proj.bias']
  flat['cls',] = state['cls_token'][0]
  if size.registers:
    flat['registers',] = state['register_tokens'][0]
  positions = state['pos_embed'][0]
  side = math.isqrt(len(positions) - 1)
  grid = positions[1:].reshape(side, side, size.width)
  grid = interpolate_positions(grid, antialias=size.registers > 0)
  flat['positions',] = np.concatenate([positions[:1], grid.reshape(GRID * GRID, size.width)])
  return traverse_util.unflatten_dict(flat)


_preprocess = jax.jit(preprocess)


@dataclasses.dataclass(frozen=True, eq=False)
class Dinov2Extractor:
  """The features of the FD-DINOv2, see `extracted.Extractor`.

  Attributes:
    weights: the weights.
    metric: name of the Fréchet distance in its features.
    task: what the network was trained for.
  """

  weights: Weights
  metric: str = 'FD-DINOv2'
  task: str = 'self-supervised (DINOv2)'

  @property
  def name(self) -> str:
    """'dinov2_vitl14' or 'dinov2_vitl14_reg4' for the network of the paper, without and with registers."""
    size = self.weights.size
    registers = f'_reg{size.registers}' if size.registers else ''
    return f'dinov2_vit{_SIZES.get(size.width, size.width)}{PATCH}{registers}'

  @property
  def dimension(self) -> int:
    """Number of features."""
    return self.weights.size.width

  @property
  def digest(self) -> str:
    """SHA-256 of the weights."""
    return self.weights.digest

  def of(self, images: jax.Array) -> Extracted:
    """Maps (n, H, W, 1 or 3) uint8 images on the devices to features, without waiting for the result."""
    return Extracted(_of_images(self._params, images, self.weights.size, sharding.device_count()))

  def of_given(self, batches: Iterable[Batch], size: int) -> Iterator[tuple[int, Extracted]]:
    """Yields the number of images and the features of batches of `size` images, from batches of any sizes of images."""
    for places, inputs in image_batches.preprocessed(batches, size, preprocess, _preprocess):
      found = _of_preprocessed(self._params, inputs, self.weights.size, sharding.device_count())
      yield len(places), Extracted(found)

  @property
  def at_once(self) -> int:
    """Number of images that are computed at a time, on all devices."""
    return AT_ONCE * sharding.device_count()

  @functools.cached_property
  def _params(self) -> Params:
    with jax.ensure_compile_time_eval():  # arrays, also if only shapes are asked for
      return sharding.replicate(self.weights.params)


def _forward(params: Params, images: jax.Array, size: Size) -> jax.Array:
  found: Any = Dinov2(size).apply({'params': params}, images)
  features: jax.Array = found
  return features


@functools.partial(compilation.jit, static_argnums=(2, 3))
def _of_preprocessed(params: Params, images: jax.Array, size: Size, devices: int) -> jax.Array:
  found: jax.Array = image_batches.in_parts(
    lambda part: _forward(params, part, size), images, devices, AT_ONCE
  )
  return found


@functools.partial(compilation.jit, static_argnums=(2, 3))
def _of_images(params: Params, images: jax.Array, size: Size, devices: int) -> jax.Array:
  found: jax.Array = image_batches.in_parts(
    lambda part: _forward(params, preprocess(part), size), images, devices, AT_ONCE
  )
  return found


def load(path: str | os.PathLike[str], flag: str = KEY) -> Dinov2Extractor:
  """Reads the weights in a file, see `read_weights`, and returns the extractor."""
  return Dinov2Extractor(read_weights(path, flag))
