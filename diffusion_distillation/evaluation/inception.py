"""The Inception of the FID as a feature extractor, from a weight file that the user names.

The file is `pt_inception-2015-12-05-*.pth`, which pytorch-fid publishes, or a safetensors file of the same state dict. Nothing in
it is executed. As no digest of the public weights is known to this project, the digest of the weights stands beside every number.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flax import traverse_util

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.given_images import Batch
from diffusion_distillation.networks.inception import (
  BATCH_NORM_EPSILON,
  NUM_FEATURES,
  NUM_LOGITS,
  SIDE,
  Inception,
  Outputs,
  preprocess,
)
from diffusion_distillation.system import compilation, sharding, torch_files
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

Arrays = dict[str, np.ndarray]

AT_ONCE = 64  # maximum number of images per device at a time, which bounds the memory
_FC = ('fc.weight', 'fc.bias')
_NORMS = ('weight', 'bias', 'running_mean', 'running_var')
_COUNTER = 'num_batches_tracked'


class Weights(NamedTuple):
  """The weights in a file.

  Attributes:
    params: parameters of `Inception(num_logits)`, float32.
    num_logits: number of classes; 0 if the file has no last layer.
    digest: sha256 of the state dict in float32 without counters, the same for .pth and .safetensors.
  """

  params: Params
  num_logits: int
  digest: str


def read_weights(path: str | os.PathLike[str], flag: str) -> Weights:
  """Reads pytorch-fid's state dict from a .pth or .safetensors file.

  The file may lack the last layer, `fc`, and the counters `num_batches_tracked`.

  Args:
    path: the file.
    flag: the flag or config key that the path comes from, for messages.

  Raises:
    UserError: the file does not exist, is damaged, or holds other tensors; the message names them.
  """
  source = f'{flag}={os.fspath(path)}'
  file = paths.on_disk(flag, path)
  if not file.is_file():
    raise UserError(
      f'{source}: there is no such file; name the pt_inception-2015-12-05 weights of pytorch-fid'
    )
  is_safetensors = file.suffix.lower() == '.safetensors'
  found = _read_safetensors(file, source) if is_safetensors else torch_files.read(file, source)
  state = _checked(found, source)
  return Weights(_to_params(state), NUM_LOGITS if _FC[0] in state else 0, digest(state))


def _read_safetensors(path: pathlib.Path, source: str) -> Arrays:
  try:
    return {name: np.asarray(value) for name, value in safetensors.flax.load_file(path).items()}
  except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
    raise UserError(f'{source} is damaged or not a safetensors file ({error}); copy it again') from error


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of the state dict, in the layout of PyTorch, by name."""
  images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  tree = jax.eval_shape(Inception().init, jax.random.key(0), images)['params']
  found: dict[str, tuple[int, ...]] = {}
  for parts, leaf in traverse_util.flatten_dict(tree).items():
    layer = '.'.join(parts[:-1])
    if parts[-1] == 'kernel' and layer != 'fc':
      height, width, inputs, outputs = leaf.shape
      found[f'{layer}.conv.weight'] = (outputs, inputs, height, width)
      found |= {f'{layer}.bn.{name}': (outputs,) for name in _NORMS}
  return found | {'fc.weight': (NUM_LOGITS, NUM_FEATURES), 'fc.bias': (NUM_LOGITS,)}


def _checked(found: Mapping[str, np.ndarray], source: str) -> Arrays:
  """Returns the tensors of the network in float32; raises UserError unless all are there with the right shapes."""
  shapes = _shapes()
  given = {name: value for name, value in found.items() if not name.endswith(f'.bn.{_COUNTER}')}
  wanted = {name for name in shapes if name not in _FC or any(n in given for n in _FC)}
  for problem, names in (('lacks', wanted - given.keys()), ('has', given.keys() - wanted)):
    if names:
      more = f' and {len(names) - 1} other{"s" * (len(names) > 2)}' if len(names) > 1 else ''
      raise UserError(
        f'{source} {problem} {min(names)[:80]}{more}, so it is not the Inception of the FID; name the '
        'pt_inception-2015-12-05 weights of pytorch-fid'
      )
  state: Arrays = {}
  for name in sorted(wanted):
    value = np.asarray(given[name])
    if value.shape != shapes[name]:
      raise UserError(
        f'{source}: {name} has shape {value.shape} instead of {shapes[name]}, so it is not the Inception of the FID; '
        'name the pt_inception-2015-12-05 weights of pytorch-fid'
      )
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise UserError(f'{source}: {name} holds {value.dtype} instead of floating-point numbers')
    state[name] = np.ascontiguousarray(value, np.float32)
    negative = name.endswith('running_var') and value.size and state[name].min() < 0.0
    if negative or not np.isfinite(state[name]).all():
      raise UserError(
        f'{source}: {name} has numbers that are {"negative" if negative else "not finite"}'
      )
  return state


def _to_params(state: Arrays) -> Params:
  """Folds each batch normalization into its convolution, in float64; returns the parameters of `Inception`."""
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for name, kernel in state.items():
    if name.endswith('.conv.weight'):
      layer = name.removesuffix('.conv.weight')
      scale, bias, mean, var = (np.float64(state[f'{layer}.bn.{norm}']) for norm in _NORMS)
      scale = scale / np.sqrt(var + BATCH_NORM_EPSILON)
      folded = (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
      flat[(*layer.split('.'), 'kernel')] = np.ascontiguousarray(folded, np.float32)
      flat[(*layer.split('.'), 'bias')] = (bias - mean * scale).astype(np.float32)
  if _FC[0] in state:
    flat['fc', 'kernel'] = np.ascontiguousarray(state['fc.weight'].T)
    flat['fc', 'bias'] = state['fc.bias']
  return traverse_util.unflatten_dict(flat)


def preprocessed(batches: Iterable[Batch], size: int) -> Iterator[tuple[np.ndarray, jax.Array]]:
  """Yields places and preprocessed images (size, SIDE, SIDE, 3) on the devices, of batches of at most `size` images.

  The images beyond the places are padding.

  Complete batches are resized on the devices, by a small program for each size of images. The rest is resized by NumPy and put
  together, so that a folder of many sizes needs few programs and no half-empty batches.
  """
  places, rest = np.empty(0, np.int64), np.empty((0, SIDE, SIDE, 3), np.float32)
  for batch in batches:
    if len(batch.places) == size:
      yield batch.places, _preprocess(sharding.spread(batch.images))
      continue
    places = np.concatenate([places, batch.places])
    rest = np.concatenate([rest, preprocess(batch.images)])
    if len(rest) >= size:
      yield places[:size], sharding.spread(rest[:size])
      places, rest = places[size:], rest[size:]
  if len(rest):
    padding = np.zeros((size - len(rest), SIDE, SIDE, 3), np.float32)
    yield places, sharding.spread(np.concatenate([rest, padding]))


_preprocess = jax.jit(preprocess)


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionExtractor:
  """The features of the FID, see `extracted.Extractor`.

  Attributes:
    weights: the weights.
    name: name of the extractor.
    metric: name of the Fréchet distance in its features.
    task: what the network was trained to predict.
    dimension: number of features.
  """

  weights: Weights
  name: str = 'inception-2015-12-05'
  metric: str = 'FID'
  task: str = 'classes of ImageNet'
  dimension: int = NUM_FEATURES

  @property
  def digest(self) -> str:
    """SHA-256 of the weights."""
    return self.weights.digest

  def of(self, images: jax.Array) -> Extracted:
    """Maps (n, H, W, 1 or 3) uint8 images on the devices to features, without waiting for the result.

    The logits are without the bias of the last layer, as in the original Inception score (Salimans et al. 2016) and in ADM's;
    None if the weights have no last layer.
    """
    found = _of_images(self._params, images, self.weights.num_logits, sharding.device_count())
    return self._extracted(found)

  def of_given(self, batches: Iterable[Batch], size: int) -> Iterator[tuple[int, Extracted]]:
    """Yields the number of images and the features of batches of `size` images, from batches of any sizes of images."""
    for places, inputs in preprocessed(batches, size):
      yield len(places), self._extracted(self.of_preprocessed(inputs))

  def of_preprocessed(self, images: jax.Array) -> Outputs:
    """Maps `preprocess`ed images (n, 299, 299, 3) on the devices to the network's outputs, without those of blocks."""
    return _of_preprocessed(self._params, images, self.weights.num_logits)

  @property
  def at_once(self) -> int:
    """Number of images that are computed at a time, on all devices."""
    return AT_ONCE * sharding.device_count()

  @functools.cached_property
  def _params(self) -> Params:
    with jax.ensure_compile_time_eval():  # arrays, also if only shapes are asked for
      return sharding.replicate(self.weights.params)

  def _extracted(self, found: Outputs) -> Extracted:
    logits = None if found.logits is None else found.logits - self._params['fc']['bias'][None]
    return Extracted(found.pool3, logits, found.spatial)


def _forward(params: Params, images: jax.Array, num_logits: int) -> Outputs:
  found: Any = Inception(num_logits).apply({'params': params}, images)
  outputs: Outputs = found
  return outputs._replace(pool64=None, pool192=None, mixed768=None)


@functools.partial(compilation.jit, static_argnums=2)
def _of_preprocessed(params: Params, images: jax.Array, num_logits: int) -> Outputs:
  return _forward(params, images, num_logits)


@functools.partial(compilation.jit, static_argnums=(2, 3))
def _of_images(params: Params, images: jax.Array, num_logits: int, devices: int) -> Outputs:
  """Maps uint8 images, which are split over the devices, to features: at most AT_ONCE on each device at a time."""
  each = len(images) // devices
  times = -(-each // AT_ONCE)
  size = -(-each // times)
  parts = images.reshape(devices, each, *images.shape[1:])
  parts = jnp.pad(parts, [(0, 0), (0, times * size - each), *[(0, 0)] * (images.ndim - 1)])
  parts = parts.reshape(devices, times, size, *images.shape[1:]).swapaxes(0, 1)

  def some(part: jax.Array) -> Outputs:
    found = _forward(params, preprocess(part.reshape(-1, *images.shape[1:])), num_logits)
    return jax.tree.map(lambda x: x.reshape(devices, size, -1), found)

  def joined(x: jax.Array) -> jax.Array:  # (times, devices, size, D)
    whole = x.swapaxes(0, 1).reshape(devices, times * size, -1)
    return whole[:, :each].reshape(len(images), -1)

  return jax.tree.map(joined, jax.lax.map(some, parts))


def load(path: str | os.PathLike[str], flag: str = 'evaluation.inception') -> InceptionExtractor:
  """Reads the weights in a file, see `read_weights`, and returns the extractor."""
  return InceptionExtractor(read_weights(path, flag))
