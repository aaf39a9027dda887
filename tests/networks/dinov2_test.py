"""The network of DINOv2: what transformers answered for known weights, Pillow's resize, and position embeddings in closed form."""

import functools

import jax
import numpy as np
import PIL.Image
import pytest

from diffusion_distillation.evaluation import dinov2 as weights
from diffusion_distillation.networks import dinov2
from diffusion_distillation.networks.dinov2 import GRID, SIDE, Dinov2, Size
from tests import peers


@functools.cache
def peer(name):
  """A case, its arrays, and our weights of it."""
  case, arrays = peers.read(name)
  state, size = weights._checked(weights._original_names(peers.state_dict(case)), 'case')
  return case, arrays, weights._to_params(state, size), size


@pytest.mark.parametrize(('name', 'registers'), [('dinov2_tiny', 0), ('dinov2_reg4_tiny', 4)])
def test_recorded_outputs(name, registers):
  case, arrays, params, size = peer(name)
  assert size == Size(width=128, depth=2, hidden=256, registers=registers, gated=False)
  inputs = dinov2.preprocess(arrays['in/images'])
  found = jax.jit(Dinov2(size).apply)({'params': params}, inputs)
  assert np.abs(arrays['out/cls'][0] - arrays['out/cls'][1]).max() > 0.1  # the images differ
  peers.assert_close(case, 'cls', found, arrays['out/cls'])


def test_recorded_pixels():
  _, arrays, *_ = peer('dinov2_tiny')
  found = dinov2.resize(arrays['in/images'])[:, :40, 100:140]
  np.testing.assert_array_equal(found, arrays['out/resized_crop'])


SHAPES = [(32, 32), (28, 28), (8, 9), (64, 300), (500, 230), (224, 97), (224, 224), (1, 1), (1000, 3)]


@pytest.mark.parametrize('shape', SHAPES)
def test_images_are_resized_exactly_as_by_pillow(shape):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  expected = PIL.Image.fromarray(image).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(dinov2.resize(image[None])[0], np.asarray(expected))


def test_devices_and_numpy_preprocess_alike():
  images = np.random.default_rng(1).integers(0, 256, (2, 40, 31, 1), np.uint8)
  ours = dinov2.preprocess(images)
  np.testing.assert_allclose(jax.jit(dinov2.preprocess)(images), ours, atol=1e-6)
  assert ours.shape == (2, SIDE, SIDE, 3) and ours.dtype == np.float32
  grey = (dinov2.resize(images)[..., 0] / 255.0).astype(np.float32)
  np.testing.assert_allclose(ours[..., 2], (grey - 0.406) / 0.225, atol=1e-5)


def test_positions_of_another_grid_are_interpolated():
  """A ramp stays a ramp away from the border, up to the error of the kernel; without registers, there is a small offset."""
  side = 37  # of the public weights, for 518 pixels
  ramp = np.broadcast_to(np.arange(side, dtype=np.float32)[:, None, None], (side, side, 2))
  inner, at = slice(2, GRID - 2), np.arange(GRID) + 0.5
  plain = dinov2.interpolate_positions(ramp, antialias=False)
  np.testing.assert_allclose(plain[inner, 0, 0], (at * side / 16.1 - 0.5)[inner], atol=0.06)
  smooth = dinov2.interpolate_positions(ramp, antialias=True)
  np.testing.assert_allclose(smooth[inner, 5, 1], (at * side / 16 - 0.5)[inner], atol=0.02)
  own = np.random.default_rng(0).standard_normal((GRID, GRID, 2)).astype(np.float32)
  for antialias in (False, True):
    np.testing.assert_array_equal(dinov2.interpolate_positions(own, antialias), own)


def test_the_gated_perceptron_is_that_of_the_giant():
  """In closed form: silu of the first half times the second."""
  size = Size(width=64, depth=1, hidden=4, gated=True)
  block = dinov2.Block(size)
  rng = np.random.default_rng(0)
  w12, w3 = rng.standard_normal((64, 8)), rng.standard_normal((4, 64))
  zeros = {'kernel': np.zeros((64, 192)), 'bias': np.zeros(192)}
  scale = {'scale': np.ones(64), 'bias': np.zeros(64)}
  params = {
    'norm1': scale,
    'norm2': scale,
    'ls1': np.ones(64),
    'ls2': np.full(64, 2.0),
    'qkv': zeros,
    'proj': {'kernel': np.zeros((64, 64)), 'bias': np.zeros(64)},
    'w12': {'kernel': w12, 'bias': np.zeros(8)},
    'w3': {'kernel': w3, 'bias': np.zeros(64)},
  }
  x = rng.standard_normal((1, 3, 64))
  normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  gate, up = np.split(normal @ w12, 2, -1)
  expected = x + 2.0 * ((gate / (1.0 + np.exp(-gate)) * up) @ w3)
  np.testing.assert_allclose(block.apply({'params': params}, x), expected, rtol=1e-3, atol=1e-4)
