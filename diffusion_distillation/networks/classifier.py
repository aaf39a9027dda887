"""A small classifier whose activations are used to compare images: for evaluation, and as a training distance."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

Params = Any
_LAYERS = 'layers'


class Classifier(nn.Module):
  """Convolutions down to at most 4x4, then two dense layers. The features are the 64 inputs of the last dense layer."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x: (B, H, W, C) in [-1, 1]. Returns logits (B, num_classes) and features (B, 64)."""
    h = nn.relu(nn.Conv(32, (3, 3), name='conv0')(x))
    self.sow(_LAYERS, 'h', h)
    for k in range(1, math.ceil(math.log2(x.shape[1] / 4)) + 1):
      h = nn.relu(nn.Conv(64, (3, 3), strides=2, name=f'conv{k}')(h))
      self.sow(_LAYERS, 'h', h)
    features = nn.relu(nn.Dense(64, name='features')(h.reshape(len(h), -1)))
    self.sow(_LAYERS, 'h', features)
    return nn.Dense(self.num_classes, name='logits')(features), features


def apply(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns logits and features of images x (B, H, W, C) in [-1, 1]."""
  outputs: Any = Classifier(params['logits']['bias'].shape[0]).apply({'params': params}, x)
  return outputs


def layers(params: Params, x: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the activations of every layer except the last: (B, h, w, 32 or 64), and the features (B, 64)."""
  model = Classifier(params['logits']['bias'].shape[0])
  return model.apply({'params': params}, x, mutable=[_LAYERS])[1][_LAYERS]['h']


def shapes(num_classes: int, image_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter of a classifier for images (H, W, C), by path."""
  x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  params = jax.eval_shape(Classifier(num_classes).init, jax.random.key(0), x)['params']
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep='/').items()}
