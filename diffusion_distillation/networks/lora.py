"""Low-rank adapters of weights (LoRA, Hu et al. 2021, arXiv:2106.09685): W + scale * down @ up in place of W.

    factors = init(rng, params, rank)  # `up` is 0, so that the adapted network is the network itself
    params = merged(params, factors, scale)

A kernel has shape (*inputs, *outputs): (in, out) in a dense layer, (height, width, in, out) in a convolution, (in, heads, dim) in a
projection to heads. Its factors are `down` (*inputs, rank) and `up` (rank, *outputs), in a dict by the module's path. They are a tree
of their own, which is trained, averaged and stored without the weights.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

Params = Any
Factors = Mapping[str, Mapping[str, Any]]

# The projections of attention in all networks: those of diffusers, of `unet`, and of EDM's networks.
ATTENTION = r'.*/(to_q|to_k|to_v|to_out\.0|q|k|v|qkv|proj)|.*attn[^/]*/proj_out'
_ROWS = 32  # of a product of factors on the host, at a time; they stay in a processor's cache
_KERNEL, _BIAS = '/kernel', '/bias'


class Adapters(NamedTuple):
  """The factors of a network's adapters, and the scale of their change."""

  factors: Factors
  scale: float


def adapted(
  params: Params, modules: str = ATTENTION
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
  """Returns the inputs and outputs of each kernel whose module's path matches the regular expression `modules`, by that path.

  The outputs are the axes that the module's bias has; without a bias, the last axis.

  Args:
    params: parameters, or their shapes.
    modules: the expression.
  """
  flat, found = traverse_util.flatten_dict(params, sep='/'), {}
  for path, leaf in flat.items():
    module = path.removesuffix(_KERNEL)
    if module != path and re.fullmatch(modules, module):
      bias = flat.get(module + _BIAS)
      split = len(leaf.shape) - (1 if bias is None else len(bias.shape))
      found[module] = tuple(leaf.shape[:split]), tuple(leaf.shape[split:])
  return found


def init(rng: jax.Array, params: Params, rank: int, modules: str = ATTENTION) -> Factors:
  """Returns factors that change nothing: `up` is 0.

  As in the code of Hu et al. and in peft, `down` is uniform within +-1 / sqrt(number of inputs).

  Raises:
    ValueError: no module matches, or the rank is not positive.
  """
  kernels = adapted(params, modules)
  if not kernels or rank < 1:
    raise ValueError(f'rank={rank} and modules={modules!r} adapt no kernel')
  keys = jax.random.split(rng, len(kernels))

  def factors(key: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, jax.Array]:
    bound = float(np.prod(inputs)) ** -0.5
    down = jax.random.uniform(key, (*inputs, rank), minval=-bound, maxval=bound)
    return {'down': down, 'up': jnp.zeros((rank, *outputs))}

  ordered = sorted(kernels.items())
  return {module: factors(key, *shape) for key, (module, shape) in zip(keys, ordered, strict=True)}


def merged(params: Params, factors: Factors, scale: float | jax.Array = 1.0) -> Params:
  """Returns the parameters with kernel + scale * down @ up for each module of `factors`; all others are the same arrays.

  A changed kernel has the wider one of the types of the kernel and of the factors.

  Raises:
    ValueError: a module does not exist, or its factors do not have the shapes of its kernel.
  """

  def change(down: Any, up: Any) -> jax.Array:
    return scale * jnp.tensordot(down, up, 1, precision=jax.lax.Precision.HIGHEST)

  return _replaced(params, factors, lambda kernel, of: kernel + change(**of).reshape(kernel.shape))


def merged_on_host(params: Params, factors: Factors, scale: float = 1.0) -> Params:
  """Returns the same in NumPy, computed in float64 and in an order that is fixed, so that all machines obtain the same bits.

  Raises:
    ValueError: see `merged`.
  """

  def change(down: np.ndarray, up: np.ndarray) -> np.ndarray:
    rank = len(up)
    left = np.asarray(down, np.float64).reshape(-1, rank)
    right = np.asarray(up, np.float64).reshape(rank, -1)
    total = np.zeros((len(left), right.shape[1]))
    for first in range(0, len(left), _ROWS):
      part = total[first : first + _ROWS]
      for column, row in zip(left[first : first + _ROWS].T, right, strict=True):
        part += np.multiply.outer(column, row)  # a matrix product may sum in any order
    return scale * total

  def added(kernel: np.ndarray, of: Mapping[str, np.ndarray]) -> np.ndarray:
    return (kernel + change(**of).reshape(kernel.shape)).astype(kernel.dtype)

  return _replaced(params, factors, added)


def _replaced(params: Params, factors: Factors, function: Any) -> Params:
  """Returns the parameters with `function(kernel, factors)` in place of each kernel that has factors."""
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  for module, of in factors.items():
    kernel = flat.get(module + _KERNEL)
    if kernel is None:
      raise ValueError(f'{module} has no kernel in these parameters')
    down, up = of['down'], of['up']
    shape, wanted = (*down.shape[:-1], *up.shape[1:]), tuple(kernel.shape)
    if (
      shape not in (wanted, wanted[2:] if wanted[:2] == (1, 1) else wanted)
      or down.shape[-1] != up.shape[0]
    ):
      raise ValueError(
        f'{module}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not fit a kernel of shape {wanted}'
      )
    flat[module + _KERNEL] = function(kernel, of)
  return traverse_util.unflatten_dict(flat, sep='/')
