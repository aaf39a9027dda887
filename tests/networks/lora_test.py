"""Low-rank adapters, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks import lora


def kernels(**changes):
  """Two projections of attention, one of them a 1x1 convolution, a norm and another layer."""
  rng = np.random.default_rng(0)
  shapes = {
    'attn1/to_q': (3, 4),
    'attn1/to_out.0': (4, 3),
    'attn2/to_k': (1, 1, 5, 2),
    'ff/net.0': (3, 8),
  }
  found = {'norm': {'scale': np.ones(3, np.float32)}}
  for path, shape in (shapes | changes).items():
    block, module = path.split('/')
    kernel = rng.standard_normal(shape).astype(np.float32)
    found.setdefault(f'blocks.0.{block}', {})[module] = {'kernel': kernel, 'bias': np.zeros(shape[-1])}
  return found


def test_the_change_is_the_product_of_the_factors_times_the_scale():
  """down = (1, 2, 3)^T, up = (1, 0, -1, 2): W_ij changes by scale * down_i up_j, and nothing else does."""
  params = kernels()
  down, up = np.float32([[1], [2], [3]]), np.float32([[1, 0, -1, 2]])
  found = lora.merged(params, {'blocks.0.attn1/to_q': {'down': down, 'up': up}}, 0.5)
  change = found['blocks.0.attn1']['to_q']['kernel'] - params['blocks.0.attn1']['to_q']['kernel']
  np.testing.assert_allclose(change, [[0.5, 0, -0.5, 1], [1, 0, -1, 2], [1.5, 0, -1.5, 3]], atol=1e-6)
  found['blocks.0.attn1']['to_q']['kernel'] = params['blocks.0.attn1']['to_q']['kernel']
  assert jax.tree.all(jax.tree.map(lambda one, other: one is other, found, params))


def test_a_convolution_of_one_pixel_is_a_matrix():
  params = kernels()
  down, up = np.ones((5, 2), np.float32), np.float32([[1, 2], [3, 4]])
  found = lora.merged(params, {'blocks.0.attn2/to_k': {'down': down, 'up': up}})
  change = found['blocks.0.attn2']['to_k']['kernel'] - params['blocks.0.attn2']['to_k']['kernel']
  np.testing.assert_allclose(change, np.broadcast_to([4.0, 6.0], (1, 1, 5, 2)), atol=1e-6)


def test_a_larger_convolution_changes_by_the_composition_of_two():
  """A convolution to 2 channels, then a matrix to 4: as one kernel, the sum over the channels in between."""
  rng = np.random.default_rng(2)
  params = kernels(**{'conv/conv1': (3, 3, 5, 4)})
  down, up = rng.standard_normal((3, 3, 5, 2)), rng.standard_normal((2, 4))
  found = lora.merged(params, {'blocks.0.conv/conv1': {'down': down, 'up': up}})
  change = found['blocks.0.conv']['conv1']['kernel'] - params['blocks.0.conv']['conv1']['kernel']
  np.testing.assert_allclose(change, np.einsum('hwir,ro->hwio', down, up), atol=1e-5)


def test_gradients_of_the_factors_are_those_of_the_kernel_by_the_chain_rule():
  """For a loss sum(G * W), dL/dup = scale down^T G and dL/ddown = scale G up^T."""
  params, module = kernels(), 'blocks.0.attn1/to_q'
  rng = np.random.default_rng(1)
  weights, down, up = (rng.standard_normal(s).astype(np.float32) for s in ((3, 4), (3, 2), (2, 4)))

  def loss(factors):
    return jnp.sum(weights * lora.merged(params, factors, 0.5)['blocks.0.attn1']['to_q']['kernel'])

  found = jax.grad(loss)({module: {'down': down, 'up': up}})[module]
  np.testing.assert_allclose(found['up'], 0.5 * down.T @ weights, rtol=1e-5)
  np.testing.assert_allclose(found['down'], 0.5 * weights @ up.T, rtol=1e-5)


def test_the_type_of_a_kernel_stays():
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), kernels())
  factors = {'down': np.ones((3, 2), np.float32), 'up': np.ones((2, 4), np.float32)}
  found = lora.merged(params, {'blocks.0.attn1/to_q': factors})
  assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
  ('factors', 'words'),
  [
    ({'blocks.0.attn1/to_v': (3, 2, 2, 4)}, 'blocks.0.attn1/to_v has no kernel in these parameters'),
    (
      {'blocks.0.attn1/to_q': (4, 2, 2, 4)},
      r'shapes \(4, 2\) and \(2, 4\) do not fit a kernel of shape',
    ),
    (
      {'blocks.0.attn1/to_q': (3, 2, 3, 4)},
      r'shapes \(3, 2\) and \(3, 4\) do not fit a kernel of shape',
    ),
  ],
)
def test_factors_that_do_not_fit_are_refused(factors, words):
  made = {
    module: {'down': np.zeros((a, b), np.float32), 'up': np.zeros((c, d), np.float32)}
    for module, (a, b, c, d) in factors.items()
  }
  with pytest.raises(ValueError, match=words):
    lora.merged(kernels(), made)
