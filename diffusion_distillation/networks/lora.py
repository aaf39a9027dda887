"""Low-rank adapters of weights (Hu et al. 2021): W + scale * down @ up in place of W.

`factors` holds `down` (in, rank) and `up` (rank, out) of each adapted module, by the module's path. In adapters of larger
convolutions, `down` is a convolution of the kernel's size, (height, width, in, rank).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Params = Any
Factors = Mapping[str, Mapping[str, Any]]

_KERNEL = '/kernel'


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
