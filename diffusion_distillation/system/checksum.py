"""A checksum of sharded arrays that is computed on their devices: nothing is gathered or copied to the host.

Each 32-bit word is mixed with its position in the array and with the array's name, and all are added modulo 2^32. Integer
addition is exact in any order, so the checksum does not depend on how arrays are split over devices and processes.
It detects accidents, not forgeries: a single changed word is always detected, other damage is missed with probability 2^-64.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LANES = 2
_STRIDE = 0x9E3779B1  # odd, so that no two words of an array are mixed with the same position


def checksum(tree: Any) -> str:
  """Returns a checksum of the names, types, shapes and values of a tree's leaves, as 16 hexadecimal digits.

  Every process must call this function.
  """
  total = np.zeros(_LANES, np.uint32)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = f'{jax.tree_util.keystr(path)}{leaf.dtype}{tuple(leaf.shape)}'
    seeds = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)[:_LANES]
    total += np.asarray(
      _of_leaf(leaf, seeds)
    )  # one at a time: concurrent programs could deadlock on CPUs
  return ''.join(f'{word:08x}' for word in total)


@jax.jit
def _of_leaf(leaf: jax.Array, seeds: jax.Array) -> jax.Array:
  words = _words(leaf)
  places = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):  # flattening would gather a sharded array
    places = places * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  places = places * np.uint32(_STRIDE)
  return jnp.stack([_mix(words ^ (places + seed)).sum(dtype=jnp.uint32) for seed in seeds])


def _words(leaf: jax.Array) -> jax.Array:
  """Returns the bits of an array as uint32; 64-bit types get an additional axis of size 2."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  size = min(leaf.dtype.itemsize, 4)
  return jax.lax.bitcast_convert_type(leaf, f'uint{8 * size}').astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's finalizer: a bijection of 32 bits in which every output bit depends on every input bit."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
