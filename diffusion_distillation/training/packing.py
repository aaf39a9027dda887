"""Parameter trees packed into fewer arrays, for elementwise operations.

Most arrays of a network are biases and scales with few elements. Concatenated into one vector, they are updated by one
operation instead of hundreds. Kernels are not packed: copying them would take longer than it saves.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Packed:
  """The arrays of a tree: `vectors` holds all 1-d arrays, concatenated; `others` holds the rest, with None for 1-d arrays."""

  vectors: jax.Array
  others: list[Any]


class Packing:
  """Packs and unpacks all subtrees of a tree that have the structure and shapes of `like`."""

  def __init__(self, like: Any) -> None:
    leaves = jax.tree.leaves(like)
    self._structure: Any = jax.tree.structure(like)
    self._shapes = [leaf.shape for leaf in leaves]
    self._sizes = [leaf.size if leaf.ndim == 1 else None for leaf in leaves]
    self._ends = np.cumsum([size for size in self._sizes if size is not None])[:-1]

  def pack(self, tree: Any) -> Any:
    """Replaces each subtree with that structure by a `Packed`."""
    return self._map(self._pack, tree, self._is_part)

  def unpack(self, tree: Any) -> Any:
    """The inverse of `pack`."""
    return self._map(self._unpack, tree, lambda part: isinstance(part, Packed))

  def _is_part(self, part: Any) -> bool:
    leaves, structure = jax.tree.flatten(part)
    return bool(self._structure == structure) and [np.shape(leaf) for leaf in leaves] == self._shapes

  def _map(self, function: Callable, tree: Any, is_part: Callable[[Any], bool]) -> Any:
    return jax.tree.map(lambda part: function(part) if is_part(part) else part, tree, is_leaf=is_part)

  def _pack(self, part: Any) -> Packed:
    leaves = jax.tree.leaves(part)
    pairs = list(zip(leaves, self._sizes, strict=True))
    vectors = [leaf for leaf, size in pairs if size is not None]
    joined = jnp.concatenate(vectors) if vectors else jnp.zeros(0)
    return Packed(joined, [None if size is not None else leaf for leaf, size in pairs])

  def _unpack(self, packed: Packed) -> Any:
    vectors = iter(jnp.split(packed.vectors, self._ends))
    leaves = [
      other if size is None else next(vectors)
      for other, size in zip(packed.others, self._sizes, strict=True)
    ]
    return jax.tree.unflatten(self._structure, leaves)
