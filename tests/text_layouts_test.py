"""A student of latents and texts trains the same on any layout of devices, and in little memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.run import inputs
from diffusion_distillation.system import sharding
from diffusion_distillation.training.step import train_steps
from tests import text_model
from tests.text_students_test import GUIDED, planned

pytestmark = pytest.mark.slow


def train(stage, updates=2):
  """What two updates on the same batch of noise report, and the parameters after them."""
  params = text_model.stored().params
  state = sharding.create(stage.recipe.create_state, params, params)
  frozen, batch = sharding.place(stage.frozen(params, None)), sharding.spread(inputs.stand_in(stage))
  step = sharding.compile_step(train_steps)
  for k in range(updates):
    state, told = step(stage.recipe.at(k), state, frozen, batch)
    sharding.wait_on_cpu(state)
  return sharding.to_host(told), sharding.to_host(state.params), state


def test_networks_are_split_over_devices_and_train_the_same(monkeypatch):
  stage = planned(methods=('dmd',), compute__teacher_dtype='bfloat16', **GUIDED)[-1]
  told, params, _ = train(stage)
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), 4)])
  told_split, params_split, state = train(stage)
  for name, value in told.items():
    np.testing.assert_allclose(told_split[name], value, rtol=2e-3, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params_split, params)
  kernel = state.params['fake_score']['conv_in']['kernel']
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_recomputed_activations_and_bfloat16_give_the_same_student():
  z, text = (
    jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate([(2, 4, 4, 2), (2, 6, 8)])
  )
  logsnr = jnp.asarray([2.0, -3.0])

  def compute(**changes):
    denoise = Denoiser(dataclasses.replace(text_model.NETWORK, **changes), 'eps')

    def loss(params):
      x = denoise(params, z, logsnr, {'text': text}, jax.random.key(3)).eps
      return jnp.mean(jnp.square(x)), x

    (_, x), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(text_model.stored().params)
    return np.asarray(x), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

  x, grads = compute()
  again, grads_again = compute(remat=True)
  np.testing.assert_allclose(again, x, atol=1e-5)
  np.testing.assert_allclose(grads_again, grads, atol=1e-5 * np.abs(grads).max())
  coarse, coarse_grads = compute(dtype='bfloat16', remat=True)
  for found, expected in ((coarse, x), (coarse_grads, grads)):
    assert found.dtype == np.float32
    assert 1e-4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 5e-2


def test_only_narrow_heads_of_self_attention_are_fused(monkeypatch):
  from diffusion_distillation.networks import transformer

  kernels = []
  really = transformer.attention
  monkeypatch.setattr(
    transformer,
    'attention',
    lambda q, k, v, kernel: kernels.append((q.shape[-1], kernel)) or really(q, k, v),
  )
  style = transformer.TransformerStyle(None, 'cudnn', False, False)
  for width in (128, 136):
    block = transformer.TransformerBlock(1, style)
    shapes = (jnp.zeros((1, 4, width)), jnp.zeros((1, 3, 8)))
    jax.eval_shape(block.init, jax.random.key(0), *shapes)
  assert kernels == [(128, 'cudnn'), (128, 'xla'), (136, 'xla'), (136, 'xla')]
