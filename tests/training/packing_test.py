"""Trees in fewer arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distillation.training.packing import Packed, Packing

TREE = {
  'a': {'kernel': np.arange(6.0).reshape(2, 3), 'bias': np.arange(3.0)},
  'b': {'bias': 10 + np.arange(2.0), 'gain': np.float64(7.0)},
}


def test_vectors_are_joined_and_all_else_stays():
  packed = Packing(TREE).pack(TREE)
  assert packed.vectors.tolist() == [0.0, 1.0, 2.0, 10.0, 11.0]
  assert [np.shape(leaf) for leaf in packed.others if leaf is not None] == [(2, 3), ()]


def test_parts_of_a_larger_tree_are_packed_and_come_back_as_they_were():
  packing, adam = Packing(TREE), optax.adam(0.1)
  whole = (TREE, adam.init(TREE), (TREE, {'other': np.ones(3)}))
  packed = packing.pack(whole)
  parts = jax.tree.leaves(packed, is_leaf=lambda part: isinstance(part, Packed))
  assert sum(isinstance(part, Packed) for part in parts) == 4  # two moments of Adam's
  jax.tree.map(np.testing.assert_array_equal, packing.unpack(packed), whole)


def test_a_tree_without_vectors_is_packed():
  tree = {'kernel': jnp.ones((2, 2))}
  packing = Packing(tree)
  jax.tree.map(np.testing.assert_array_equal, packing.unpack(packing.pack(tree)), tree)


def test_a_network_of_one_array_is_not_confused_with_the_count_of_updates():
  one, adam = jnp.ones(3), optax.adam(0.1)
  packing, whole = Packing(one), (one, adam.init(one))
  packed = packing.pack(whole)
  assert sum(leaf.ndim for leaf in jax.tree.leaves(packed)) == 3
  jax.tree.map(np.testing.assert_array_equal, packing.unpack(packed), whole)


def test_norms_are_those_of_the_tree():
  assert float(optax.tree.norm(Packing(TREE).pack(TREE))) == np.float32(
    np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(TREE)))
  )
