"""Low-rank adapters, in closed form."""

import re

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


def test_a_small_change_of_a_narrow_kernel_is_not_rounded_away():
  """1 + 2^-12 is not a bfloat16; only the changed kernel is float32."""
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), kernels())
  factors = {'down': np.full((3, 2), 2.0**-13, np.float32), 'up': np.ones((2, 4), np.float32)}
  found = lora.merged(params, {'blocks.0.attn1/to_q': factors})
  np.testing.assert_array_equal(found['blocks.0.attn1']['to_q']['kernel'], np.full((3, 4), 1 + 2.0**-12))
  types = [leaf.dtype for leaf in jax.tree.leaves(found)]
  assert types.count(jnp.bfloat16) == len(types) - 1


HEADS = {'q': ((6, 2, 3), (2, 3)), 'proj_out': ((2, 3, 6), (6,)), 'qkv': ((6, 3, 2, 3), (3, 2, 3))}


def with_heads():
  """Kernels of projections to and from heads, whose biases have the axes of the outputs."""
  rng = np.random.default_rng(3)
  return {
    'attn': {
      name: {'kernel': np.float32(rng.standard_normal(shape)), 'bias': np.zeros(bias, np.float32)}
      for name, (shape, bias) in HEADS.items()
    }
  }


def test_the_axes_of_heads_are_inputs_or_outputs_as_the_bias_says():
  params, rng = with_heads(), np.random.default_rng(4)
  assert lora.adapted(params) == {
    'attn/q': ((6,), (2, 3)),
    'attn/proj_out': ((2, 3), (6,)),
    'attn/qkv': ((6,), (3, 2, 3)),
  }
  factors = lora.init(jax.random.key(0), params, 2)
  factors = jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape)), factors)
  subscripts = {'q': 'ir,rhd->ihd', 'proj_out': 'hdr,ro->hdo', 'qkv': 'ir,rkhd->ikhd'}
  for merged in (lora.merged, lora.merged_on_host):
    found = merged(params, factors, 0.5)
    for name, how in subscripts.items():
      change = found['attn'][name]['kernel'] - params['attn'][name]['kernel']
      of = factors[f'attn/{name}']
      np.testing.assert_allclose(change, 0.5 * np.einsum(how, of['down'], of['up']), atol=1e-5)
      assert found['attn'][name]['kernel'].dtype == np.float32


def test_the_default_adapts_the_projections_of_attention_and_nothing_else():
  matched = {
    'down_blocks.0.attentions.0/transformer_blocks.0/attn1/to_q',
    'mid_block.attentions.0/to_out.0',
    'mid.attn_1/proj_out',
    'down_1.attn_0/k',
    'enc.8x8_block0/qkv',
    'enc.8x8_block0/proj',
  }
  others = {
    'down_blocks.0.attentions.0/proj_out',
    'down_blocks.0.attentions.0/transformer_blocks.0/ff.net.0.proj',
    'down_0.block_0/conv1',
    'time_emb/dense0',
  }
  assert {path for path in matched | others if re.fullmatch(lora.ATTENTION, path)} == matched


def test_new_factors_change_nothing_and_are_uniform_by_the_number_of_inputs():
  params = kernels(**{'attn1/to_q': (400, 4), 'conv/conv1': (3, 3, 5, 4)})
  factors = lora.init(jax.random.key(0), params, 8, '.*')
  assert len(factors) == 5
  assert factors['blocks.0.conv/conv1']['down'].shape == (3, 3, 5, 8)
  for merged in (lora.merged, lora.merged_on_host):
    jax.tree.map(np.testing.assert_array_equal, merged(params, factors, 7.0), params)
  down = np.asarray(factors['blocks.0.attn1/to_q']['down'])
  assert 0.049 < np.abs(down).max() <= 0.05 and np.var(down) == pytest.approx(1 / 1200, rel=0.1)
  other = lora.init(jax.random.key(1), params, 8, '.*')
  assert (other['blocks.0.attn1/to_q']['down'] != down).any()
  for rank, modules in ((0, lora.ATTENTION), (2, 'nothing')):
    with pytest.raises(ValueError, match='adapt no kernel'):
      lora.init(jax.random.key(0), params, rank, modules)


def test_on_the_host_products_are_summed_in_order_and_rounded_once():
  """1 + 2^-30 - 1 in float64 is 2^-30; in float32, it would be 0."""
  down = np.float32([[1.0, 2.0**-30, -1.0]])
  params = {'attn': {'to_q': {'kernel': np.zeros((1, 1), np.float32)}}}
  found = lora.merged_on_host(params, {'attn/to_q': {'down': down, 'up': np.ones((3, 1), np.float32)}})
  assert found['attn']['to_q']['kernel'] == 2.0**-30


def test_on_the_host_large_kernels_are_computed_in_parts():
  rng = np.random.default_rng(7)
  params = {'attn': {'to_q': {'kernel': np.zeros((70, 5), np.float32)}}}
  down, up = np.float32(rng.standard_normal((70, 3))), np.float32(rng.standard_normal((3, 5)))
  found = lora.merged_on_host(params, {'attn/to_q': {'down': down, 'up': up}}, 0.5)
  expected = 0.5 * np.einsum('ir,ro->io', down.astype(np.float64), up)
  np.testing.assert_allclose(found['attn']['to_q']['kernel'], expected, rtol=1e-6, atol=1e-7)


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
