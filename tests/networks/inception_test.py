"""The Inception of the FID: what pytorch-fid's network answered for known weights, and its pools and resize in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.evaluation import inception as weights
from diffusion_distillation.networks import inception
from tests import peers

SIDES = (32, 299)
_STEM = ('Conv2d_1a', 'Conv2d_2a', 'Conv2d_2b', 'Conv2d_3b', 'Conv2d_4a')


@functools.cache
def case():
  return peers.read('fid_inception_32_299')


def params(names=('',)):
  """Our parameters of the case; all weights whose names do not begin with one of `names` are zero."""
  says = case()[0]
  state = {
    entry['name']: peers.tensor(says, entry)
    if entry['name'].startswith(names)
    else np.broadcast_to(np.float32(0), entry['shape'])
    for entry in says['parameters']
    if entry['kind'] != 'fixed'
  }
  return weights._to_params(weights._checked(state, 'case'))


def assert_recorded(side, key, found):
  says, arrays = case()
  wanted = arrays[f'out/{key}_{side}']
  found = np.asarray(found, np.float64)[: len(wanted)]
  peers.assert_close(says, f'{key}_{side}', found, wanted[: len(found)])


def assert_block(side, key, found):
  assert_recorded(side, f'{key}_mean', found.mean((1, 2)))
  assert_recorded(side, f'{key}_crop', found[:, :4, :4, :8].transpose(0, 3, 1, 2))


@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('module', [np, jnp])
def test_resized_pixels_are_the_recorded_ones(side, module):
  images = module.asarray(case()[1][f'in/images_{side}'], np.float32) / np.float32(255)
  resized = np.asarray(inception.resize(images), np.float64)
  assert resized.shape == (6, 299, 299, 3)
  assert_recorded(side, 'resized_crop_nhwc', resized[0, 100:116, 140:156])
  assert_recorded(side, 'resized_corner_nhwc', resized[0, :8, -8:])
  moments = np.stack([resized.mean((1, 2)), resized.std((1, 2))])
  assert_recorded(side, 'resized_mean_std', moments)


@pytest.mark.parametrize(('height', 'width'), [(1, 5), (64, 200), (400, 1200), (298, 300), (2000, 7)])
def test_a_ramp_stays_one_at_half_pixel_centers(height, width):
  """Also where images shrink: an antialiased resize would be flatter at the border."""
  down, across = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
  image = np.stack(np.broadcast_arrays(down[:, None], across[None]), -1)[None]
  resized = inception.resize(image)[0].astype(np.float64)
  for axis, length in enumerate((height, width)):
    centers = np.clip((np.arange(299) + 0.5) * length / 299 - 0.5, 0, length - 1)
    expected = np.broadcast_to(centers if axis else centers[:, None], (299, 299))
    np.testing.assert_allclose(resized[..., axis], expected, atol=1e-6 * length)


def test_one_pixel_of_many_is_not_spread_when_images_shrink():
  """Each new pixel lies between two old ones; all others do not count."""
  image = np.zeros(
    (1, 897, 897, 1), np.float32
  )  # three old pixels for each new one, the middle one counts
  image[0, 1::3, 1::3] = 1.0
  np.testing.assert_allclose(inception.resize(image), 1.0, atol=1e-3)
  np.testing.assert_allclose(inception.resize(np.roll(image, 1, 1)), 0.0, atol=1e-3)


@pytest.mark.parametrize('module', [np, jnp])
def test_grey_images_are_colored_and_pixels_reach_from_minus_one_to_one(module):
  images = module.asarray(np.array([[[[0], [255]]]], np.uint8))
  found = np.asarray(inception.preprocess(images))
  assert found.shape == (1, 299, 299, 3) and found.dtype == np.float32
  assert (found[0, :, 0] == -1).all() and (found[0, :, -1] == 1).all()


BLOCKS = {
  'A': (inception.BlockA(4), 'mean'),
  'C': (inception.BlockC(2), 'mean'),
  'E': (inception.BlockE(), 'mean'),
  'E with a maximum': (inception.BlockE(maximum=True), 'max'),
}


@pytest.mark.parametrize('name', BLOCKS)
def test_pools_of_branches(name):
  """One bright pixel in a corner: the mean leaves out the pixels beyond the border."""
  block, kind = BLOCKS[name]
  x = np.zeros((1, 6, 6, 3), np.float32)
  x[0, 0, 0, 0] = 36.0
  tree = jax.eval_shape(block.init, jax.random.key(0), x)['params']
  tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tree)
  tree['branch_pool']['kernel'][0, 0, 0] = 1.0
  found = np.asarray(block.apply({'params': tree}, x))[0, ..., -1]
  expected = np.zeros((6, 6))
  expected[:2, :2] = 36.0 if kind == 'max' else [[36 / 4, 36 / 6], [36 / 6, 36 / 9]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_recorded_outputs_of_the_first_layers():
  """The others are compiled away, which makes this quick."""
  net, own = inception.Inception(), params(_STEM)

  @jax.jit
  def blocks(params, images):
    found = net.apply({'params': params}, inception.preprocess(images))
    return found.pool64, found.pool192

  for side in SIDES:
    pool64, pool192 = map(np.asarray, blocks(own, case()[1][f'in/images_{side}'][:1]))
    assert_block(side, 'pool64', pool64)
    assert_block(side, 'pool192', pool192)


@pytest.mark.slow
def test_recorded_outputs():
  net, own = inception.Inception(), params()
  apply = jax.jit(lambda params, images: net.apply({'params': params}, inception.preprocess(images)))
  for side in SIDES:
    images = case()[1][f'in/images_{side}']
    found = jax.tree.map(np.asarray, apply(own, images))
    assert_recorded(side, 'pool3', found.pool3)
    assert_recorded(side, 'logits', found.logits)
    for key in ('pool64', 'pool192', 'mixed768'):
      assert_block(side, key, getattr(found, key))
    # Of two images, the first 7 channels of Mixed_6d.branch1x1, as (height, width, channel).
    with np.load(peers.ROOT / 'fid_inception_32_299' / 'spatial.npz') as recorded:
      peers.assert_close(case()[0], '', found.spatial[:2], recorded[f'spatial_{side}'])
