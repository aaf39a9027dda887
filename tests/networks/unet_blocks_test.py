"""The blocks of the network, done by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.unet import AttnBlock, ResBlock
from tests.networks.unet_test import KEY, random_params


def group_norm(h, groups, scale, bias):
  """GroupNorm of (H, W, C) by its definition (Wu & He 2018)."""
  parts = h.reshape(*h.shape[:2], groups, -1)
  mean = parts.mean((0, 1, 3), keepdims=True)
  variance = parts.var((0, 1, 3), keepdims=True)
  return ((parts - mean) / np.sqrt(variance + 1e-6)).reshape(h.shape) * scale + bias


def swish(h):
  return h / (1 + np.exp(-h))


@pytest.mark.parametrize('heads', [1, 2])
def test_attention_block_is_scaled_dot_product_attention_plus_its_input(heads):
  x = jax.random.normal(KEY, (2, 2, 3, 8))
  block = AttnBlock(num_groups=4, num_heads=heads, head_dim=None)
  params = random_params(jax.eval_shape(block.init, KEY, x)['params'])
  got = jax.jit(block.apply)({'params': params}, x)
  p = jax.tree.map(np.float64, params)
  for k in range(2):
    h = group_norm(np.float64(x[k]), 4, **p['norm']).reshape(6, 8)
    q, key, v = (np.einsum('nc,chd->hnd', h, p[m]['kernel']) + p[m]['bias'][:, None] for m in 'qkv')
    weights = np.exp(np.einsum('hnd,hmd->hnm', q, key) / np.sqrt(8 / heads))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum('hnm,hmd,hdc->nc', weights, v, p['proj_out']['kernel']) + p['proj_out']['bias']
    np.testing.assert_allclose(got[k], x[k] + out.reshape(2, 3, 8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('resample', [None, 'down', 'up'])
def test_residual_block_scales_and_shifts_by_the_embedding(resample):
  """On flat images with 1x1-like kernels, a 3x3 convolution is a matrix and can be done by hand."""
  x, emb = jax.random.normal(KEY, (1, 2, 2, 4)), jax.random.normal(KEY, (1, 5))
  block = ResBlock(out_ch=8, num_groups=2, dropout=0.0, resample=resample)
  params = random_params(jax.eval_shape(lambda: block.init(KEY, x, emb, True))['params'])
  centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  for conv in ('conv1', 'conv2'):
    params[conv]['kernel'] = params[conv]['kernel'] * centre
  got = jax.jit(block.apply, static_argnums=3)({'params': params}, x, emb, True)[0]

  p = jax.tree.map(np.float64, params)
  resized = {
    None: lambda h: h,
    'down': lambda h: h.mean((0, 1), keepdims=True),
    'up': lambda h: np.kron(h, np.ones((2, 2, 1))),
  }[resample]

  def conv(h, name):
    return h @ p[name]['kernel'][1, 1] + p[name]['bias']

  x, emb = np.float64(x[0]), np.float64(emb[0])
  h = conv(resized(swish(group_norm(x, 2, **p['norm1']))), 'conv1')
  scale_shift = swish(emb) @ p['temb_proj']['kernel'] + p['temb_proj']['bias']
  h = group_norm(h, 2, **p['norm2']) * (1 + scale_shift[:8]) + scale_shift[8:]
  h = conv(swish(h), 'conv2')
  shortcut = resized(x) @ p['nin_shortcut']['kernel'] + p['nin_shortcut']['bias']
  np.testing.assert_allclose(got, shortcut + h, rtol=1e-4, atol=1e-4)
