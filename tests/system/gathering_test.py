"""Networks with sharded parameters compute the same as without sharding, and gather one layer at a time."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.denoiser import Function
from diffusion_distillation.system import sharding
from diffusion_distillation.system.gathering import Gathered, read_types

LAYERS, WIDTH = 4, 16


def network(params, x, dtype=jnp.float32):
  for w in params:
    x = jnp.tanh(x.astype(dtype) @ w.astype(dtype))
  return x.astype(jnp.float32)


@pytest.fixture
def gathered(monkeypatch):
  """gathered(network) with 8 devices along fsdp."""
  mesh = sharding._make(jax.devices(), 8)
  monkeypatch.setattr(sharding, '_in_use', [mesh])
  part = functools.partial(sharding._of_shape, mesh)
  return lambda function: Gathered(function, sharding.replicated(), part)


def params_and_x():
  keys = jax.random.split(jax.random.key(0), LAYERS + 1)
  params = [jax.random.normal(key, (WIDTH, WIDTH)) / 4 for key in keys[1:]]
  return params, jax.random.normal(keys[0], (8, WIDTH))


def loss(function, params, x):
  return jnp.sum(function(params, x) ** 2)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_the_whole_network(gathered, dtype):
  params, x = params_and_x()
  function = functools.partial(network, dtype=dtype)
  expected = jax.jit(jax.value_and_grad(functools.partial(loss, function), (0, 1)))(params, x)
  placed = sharding.place(params), sharding.spread(x)
  found = jax.jit(jax.value_and_grad(functools.partial(loss, gathered(function)), (0, 1)))(*placed)
  tolerance = (
    1e-5 if dtype == jnp.float32 else 0.03
  )  # partial sums over examples are rounded to bfloat16
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype == jnp.float32
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
  assert all(grad.sharding.is_equivalent_to(sharding.of(grad), 2) for grad in found[1][0])


def gathers(function, calls, params, x):
  """The number of all-gathers of whole layers in the compiled gradient of `calls` calls, one after the other."""

  def repeated(params, x):
    for _ in range(calls):
      x = function(params, x)
    return x

  placed = sharding.place(params), sharding.spread(x)
  compiled = jax.jit(jax.grad(functools.partial(loss, repeated))).lower(*placed).compile()
  return len(re.findall(rf'\[{WIDTH},{WIDTH}\]\S* all-gather\(', compiled.as_text()))


def test_every_forward_and_backward_pass_gathers_the_parameters_again(gathered):
  """In one call every layer is gathered twice, except the first, whose input needs no gradient."""
  function, (params, x) = gathered(network), params_and_x()
  assert gathers(function, 1, params, x) == 2 * LAYERS - 1
  assert gathers(function, 2, params, x) == 4 * LAYERS - 1
  # Compilers that share more than this one does are kept from it by the barriers.
  twice = jax.jit(lambda params, x: function(params, x) + function(params, 2 * x))
  assert twice.lower(params, x).as_text().count('optimization_barrier') == 2


def test_the_backward_pass_keeps_only_shards_of_the_parameters(gathered):
  params, x = params_and_x()
  kept = jax.jit(lambda params, x: jax.vjp(functools.partial(gathered(network)), params, x)[1])
  leaves = jax.tree.leaves(kept(sharding.place(params), sharding.spread(x)))
  layers = [leaf for leaf in leaves if leaf.shape == (WIDTH, WIDTH)]
  assert len(layers) == LAYERS
  assert all(leaf.addressable_shards[0].data.size == leaf.size // 8 for leaf in layers)


def test_parameters_are_gathered_in_the_type_that_they_are_read_in(gathered):
  params, x = sharding.place(params_and_x()[0]), sharding.spread(params_and_x()[1])
  function = gathered(functools.partial(network, dtype=jnp.bfloat16))
  text = jax.jit(function).lower(params, x).as_text()
  constrained = re.findall(rf'sharding_constraint .*tensor<{WIDTH}x{WIDTH}x(\w+)>', text)
  assert constrained.count('bf16') == 2 * LAYERS  # each as a shard, then whole
  assert constrained.count('f32') == LAYERS  # as they are given


@jax.jit
def _jitted(w, x):
  return x @ w.astype(jnp.bfloat16)


@pytest.mark.parametrize(
  ('function', 'dtype'),
  [
    (lambda w: w.astype(jnp.bfloat16), 'bfloat16'),
    (lambda w: _jitted(w, jnp.ones((2, 4), jnp.bfloat16)), 'bfloat16'),
    (jax.checkpoint(lambda w: jnp.sin(w.astype(jnp.bfloat16))), 'bfloat16'),
    (lambda w: (w.astype(jnp.bfloat16), w.astype(jnp.float16)), 'float32'),
    (lambda w: (w.astype(jnp.bfloat16), w), 'float32'),
    (lambda w: (w.astype(jnp.bfloat16), w + 1), 'float32'),
    (lambda w: jax.nn.relu(w).astype(jnp.bfloat16), 'float32'),
    (lambda w: 0.0, 'float32'),
  ],
)
def test_the_type_in_which_a_parameter_is_read(function, dtype):
  assert read_types(function, jnp.ones((4, 4))) == np.dtype(dtype)


def test_a_narrow_parameter_is_gathered_in_its_own_type():
  narrow = jnp.ones((4, 4), jnp.bfloat16)
  assert read_types(lambda w: w.astype(jnp.float32), narrow) == jnp.bfloat16


def test_layers_of_flax_are_read_in_their_own_types():
  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      h = nn.remat(nn.Dense)(4, dtype=jnp.bfloat16, name='narrow')(x)
      return nn.Conv(4, (3,), name='wide')(h.astype(jnp.float32))

  module, x = Two(), jnp.ones((2, 5, 4))
  params = module.init(jax.random.key(0), x)['params']
  types = read_types(lambda params: Function(module)(params, x), params)
  assert types['narrow']['kernel'] == jnp.bfloat16 and types['wide']['kernel'] == jnp.float32
