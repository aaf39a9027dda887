"""Low-rank adapters of weight matrices (Hu et al. 2021): W + scale * down @ up in place of W.

    factors = init(rng, params, RANK)                 # the adapted model is the model itself: up is 0
    adapted = merged(params, factors, scale)

New factors are made for matrices, of linear layers and of 1x1 convolutions, by default those of attention: queries, keys, values
and outputs. Factors of other convolutions, which files from elsewhere have, can be merged: there `down` is a convolution of the
kernel's size, (height, width, in, rank). `factors` is a tree of its own, which can be trained, averaged and stored without the weights.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Params = Any
Factors = Mapping[str, Mapping[str, Any]]

ATTENTION = r'.*/(to_q|to_k|to_v|to_out\.0)'  # diffusers' names of the projections of attention
_KERNEL = '/kernel'


def adapted(params: Params, modules: str = ATTENTION) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the kernels whose module's path matches the regular expression `modules`, by that path.

  Kernels have shape (in, out), or (1, 1, in, out) in a convolution; any other matching kernel raises ValueError.
  """
  found = {}
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    module = path.removesuffix(_KERNEL)
    if module == path or not re.fullmatch(modules, module):
      continue
    if not (leaf.ndim == 2 or (leaf.ndim == 4 and leaf.shape[:2] == (1, 1))):
      raise ValueError(f'{module} has a kernel of shape {leaf.shape}, which is no matrix')
    found[module] = tuple(leaf.shape)
  return found


def init(rng: jax.Array, params: Params, rank: int, modules: str = ATTENTION) -> Factors:
  """Returns factors that change nothing: `down` (in, rank) is normal with variance 1 / rank, `up` (rank, out) is 0.

  Raises:
    ValueError: no module matches, or the rank is not positive.
  """
  shapes = adapted(params, modules)
  if not shapes or rank < 1:
    raise ValueError(f'rank={rank} and modules={modules!r} adapt no matrix')
  keys = jax.random.split(rng, len(shapes))
  return {
    module: {
      'down': jax.random.normal(key, (shape[-2], rank)) / jnp.sqrt(float(rank)),
      'up': jnp.zeros((rank, shape[-1])),
    }
    for key, (module, shape) in zip(keys, sorted(shapes.items()), strict=True)
  }


def merged(params: Params, factors: Factors, scale: float | jax.Array = 1.0) -> Params:
  """Returns the parameters with kernel + scale * down @ up for each module of `factors`; all others are the same arrays.

  Raises:
    ValueError: a module does not exist, or its factors do not have the shapes of its kernel.
  """
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  for module, of in factors.items():
    kernel = flat.get(module + _KERNEL)
    if kernel is None:
      raise ValueError(f'{module} has no kernel in these parameters')
    down, up = of['down'], of['up']
    size = down.shape[:-2] or (1,) * (kernel.ndim - 2)
    if (*size, down.shape[-2], up.shape[1]) != tuple(kernel.shape) or down.shape[-1] != up.shape[0]:
      raise ValueError(
        f'{module}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not fit a kernel of shape '
        f'{tuple(kernel.shape)}'
      )
    change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    flat[module + _KERNEL] = (kernel + scale * change.reshape(kernel.shape)).astype(kernel.dtype)
  return traverse_util.unflatten_dict(flat, sep='/')
