"""The Inception of the FID as a feature extractor, from a weight file that the user names.

The file is `pt_inception-2015-12-05-*.pth`, which pytorch-fid publishes, or a safetensors file of the same state dict. Nothing in
it is executed. As no digest of the public weights is known to this project, the digest of the weights stands beside every number.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import image_batches, weight_files
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
from diffusion_distillation.system import compilation, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

AT_ONCE = 64  # maximum number of images per device at a time, which bounds the memory
_FC = ('fc.weight', 'fc.bias')
_NORMS = ('weight', 'bias', 'running_mean', 'running_var')
_COUNTER = 'num_batches_tracked'
_NETWORK = 'the Inception of the FID'
_EXPECTED = 'the pt_inception-2015-12-05 weights of pytorch-fid'


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
  found, source = weight_files.read(path, flag, _EXPECTED)
  state = _checked(found, source)
  return Weights(_to_params(state), NUM_LOGITS if _FC[0] in state else 0, digest(state))


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


def _checked(found: Mapping[str, np.ndarray], source: str) -> weight_files.Arrays:
  """Returns the tensors of the network in float32; raises UserError unless all are there with the right shapes."""
  shapes = _shapes()
  given = {name: value for name, value in found.items() if not name.endswith(f'.bn.{_COUNTER}')}
  wanted = {name for name in shapes if name not in _FC or any(n in given for n in _FC)}
  weight_files.check_names(given.keys(), wanted, source, _NETWORK, _EXPECTED)
  own_shapes = {name: shapes[name] for name in wanted}
  state = weight_files.to_float32(given, own_shapes, source, _NETWORK, _EXPECTED)
  for name, value in state.items():
    if name.endswith('running_var') and value.size and value.min() < 0.0:
      raise UserError(f'{source}: {name} has numbers that are negative')
  return state


def _to_params(state: weight_files.Arrays) -> Params:
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

  See `image_batches.preprocessed`.
  """
  return image_batches.preprocessed(batches, size, preprocess, _preprocess)


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

  def of_part(part: jax.Array) -> Outputs:
    return _forward(params, preprocess(part), num_logits)

  found: Outputs = image_batches.in_parts(of_part, images, devices, AT_ONCE)
  return found


def load(path: str | os.PathLike[str], flag: str = 'evaluation.inception') -> InceptionExtractor:
  """Reads the weights in a file, see `read_weights`, and returns the extractor."""
  return InceptionExtractor(read_weights(path, flag))
