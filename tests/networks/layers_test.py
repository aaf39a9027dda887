"""Layers against their definitions and against flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.layers import Dense, Dropout, GroupNorm, HalvedDense, attention

KEY = jax.random.key(0)
OURS, THEIRS = GroupNorm(2), nn.GroupNorm(2)


@pytest.fixture(scope='module')
def inputs():
  """x (3, 4, 4, 6), parameters of a norm, and a scale and shift (3, 6)."""
  keys = jax.random.split(KEY, 5)
  x = 0.5 + 2.0 * jax.random.normal(keys[0], (3, 4, 4, 6))
  params = {'scale': jax.random.normal(keys[1], (6,)), 'bias': jax.random.normal(keys[2], (6,))}
  return x, params, jax.random.normal(keys[3], (3, 6)), jax.random.normal(keys[4], (3, 6))


@jax.jit
def ours(x, params, scale, shift):
  y, pull = jax.vjp(
    lambda *args: OURS.apply({'params': args[1]}, args[0], *args[2:]), x, params, scale, shift
  )
  return y, pull(jnp.cos(y))


@jax.jit
def theirs(x, params, scale, shift):
  def norm(x, params, scale, shift):
    y = THEIRS.apply({'params': params}, x)
    return y * (1.0 + scale[:, None, None]) + shift[:, None, None]

  y, pull = jax.vjp(norm, x, params, scale, shift)
  return y, pull(jnp.cos(y))


def test_group_norm_with_scale_and_shift_is_flaxs_and_so_are_its_gradients(inputs):
  for got, expected in zip(
    jax.tree.leaves(ours(*inputs)), jax.tree.leaves(theirs(*inputs)), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_group_norm_has_the_parameters_of_flaxs(inputs):
  x = inputs[0]
  assert jax.tree.map(jnp.shape, OURS.init(KEY, x)) == jax.tree.map(jnp.shape, THEIRS.init(KEY, x))


def test_group_norm_of_flat_groups_is_its_bias(inputs):
  _, params, *_ = inputs
  y, grads = ours(jnp.full((3, 4, 4, 6), 7.0), params, jnp.zeros((3, 6)), jnp.zeros((3, 6)))
  np.testing.assert_allclose(y, jnp.broadcast_to(params['bias'], y.shape), atol=2e-3)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_group_norm_in_bfloat16_sums_in_float32(inputs):
  """Of 2^14 values about 8, sums in bfloat16 would stop at 2048."""
  x = (8.0 + jax.random.normal(KEY, (1, 128, 128, 6))).astype(jnp.bfloat16)
  params = inputs[1]
  y = GroupNorm(2, jnp.bfloat16).apply({'params': params}, x)
  assert y.dtype == jnp.bfloat16
  expected = THEIRS.apply({'params': params}, x.astype(jnp.float32))
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.999])
def test_dropout_keeps_its_share_and_scales_what_it_keeps(rate):
  """To 4 standard deviations; 26/256, the nearest whole byte to 0.1, would be 6 away."""
  x = jnp.ones((512, 33, 61))
  y = Dropout(rate).apply({}, x, False, rngs={'dropout': KEY})
  kept = np.asarray(y) != 0
  np.testing.assert_allclose(np.asarray(y)[kept], 1 / (1 - rate), rtol=1e-6)
  # Within an example all share a threshold, a whole number of 256ths.
  spread = np.sqrt(rate * (1 - rate) / kept.size + (0.5 / 256) ** 2 / len(x))
  assert abs(kept.mean() - (1 - rate)) < 4 * spread
  assert not (kept[0] == kept[1]).all() or rate > 0.99


def test_dropout_is_a_function_of_its_key_and_off_where_it_is_deterministic():
  x = jax.random.normal(KEY, (4, 5, 7))
  drop = lambda seed: Dropout(0.5).apply({}, x, False, rngs={'dropout': jax.random.key(seed)})  # noqa: E731
  np.testing.assert_array_equal(drop(1), drop(1))
  assert not (drop(1) == drop(2)).all()
  assert Dropout(0.5).apply({}, x, True) is x
  assert Dropout(0.0).apply({}, x, False) is x


@pytest.mark.parametrize('heads', [1, 3])
def test_attention_is_its_definition(heads):
  q, k, v = jax.random.normal(KEY, (3, 2, 5, heads, 4))
  logits = np.einsum('bqhd,bkhd->bhqk', np.float64(q), np.float64(k)) / 2.0
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = np.einsum('bhqk,bkhd->bqhd', weights, np.float64(v))
  np.testing.assert_allclose(attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_attention_in_bfloat16_has_its_softmax_in_float32():
  """The weights of 999 equal keys sum to 1 as near as they are themselves rounded, once, at the end."""
  q, k = jnp.ones((2, 1, 999, 1, 4), jnp.bfloat16)
  np.testing.assert_allclose(jnp.float32(attention(q, k, k)), 999 * jnp.bfloat16(1 / 999), rtol=2**-8)
  jaxpr = jax.make_jaxpr(attention)(q, k, k)
  exps = [line for line in str(jaxpr).splitlines() if '= exp ' in line]
  assert exps and all(':f32[' in line for line in exps)


def test_the_kernel_of_cudnn_is_asked_for_by_its_name(monkeypatch):
  """It runs on GPUs alone: here jax's own form stands in for it, which must agree with ours."""
  fused, asked = jax.nn.dot_product_attention, []

  def stand_in(q, k, v, implementation):
    asked.append(implementation)
    return fused(q, k, v, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  q, k, v = jax.random.normal(KEY, (3, 2, 5, 3, 4))
  np.testing.assert_allclose(attention(q, k, v, 'cudnn'), attention(q, k, v), rtol=1e-5, atol=1e-6)
  assert asked == ['cudnn']


def pulled(function, *args):
  """The value of a function, and the gradients of the sum of its cosines."""
  value, pull = jax.vjp(function, *args)
  return value, pull(jax.tree.map(jnp.cos, value))


def halves(params, x, dtype=None):
  return tuple(jnp.split(nn.Dense(6, dtype=dtype).apply(params, x), 2, axis=-1))


@pytest.mark.parametrize('shape', [(5, 4), (3, 2, 2, 4)])
@pytest.mark.parametrize(
  'layer, expected',
  [
    (Dense(6), nn.Dense(6).apply),
    (Dense(6, use_bias=False), nn.Dense(6, use_bias=False).apply),
    (HalvedDense(3), halves),
  ],
)
def test_a_dense_layer_has_the_parameters_values_and_gradients_of_flaxs(layer, expected, shape):
  x = jax.random.normal(KEY, shape)
  initial = layer.init(KEY, x)
  jax.tree.map(
    np.testing.assert_array_equal, initial, nn.Dense(6, 'bias' in initial['params']).init(KEY, x)
  )
  params = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), initial)
  found, wanted = pulled(layer.apply, params, x), pulled(expected, params, x)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def test_a_halved_dense_layer_in_bfloat16_is_flaxs():
  x = jax.random.normal(KEY, (5, 4))
  layer = HalvedDense(3, jnp.bfloat16, nn.initializers.normal())
  params = layer.init(KEY, x)
  expected = nn.Dense(6, kernel_init=nn.initializers.normal()).init(KEY, x)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  for found, wanted in zip(layer.apply(params, x), halves(params, x, jnp.bfloat16), strict=True):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted)
