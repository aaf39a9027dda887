"""What happens to pixels on the device, and that training does it."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.methods.method import OneNetwork
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.conditioning import Classes, drop
from diffusion_distillation.networks.spaces import Latents, Pixels
from diffusion_distillation.system import sharding
from diffusion_distillation.training import augment
from tests import tiny

SPACE = Pixels()
LABEL = {'label': Classes(10)}
ALL = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


def images(count, channels=1, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, channels)).astype(np.uint8)


def test_pixels_survive_the_way_to_x_and_back():
  x = SPACE.encode(ALL)
  assert float(x.min()) == -1.0 and float(x.max()) == 1.0 and x.dtype == jnp.float32
  np.testing.assert_allclose(x, ALL.astype(np.float64) * 2 / 255 - 1, atol=1e-6)
  np.testing.assert_array_equal(SPACE.decode(x), ALL)
  assert SPACE.decode(x).dtype == jnp.uint8


def test_x_goes_to_the_nearest_pixel():
  for step in (-0.49, 0.49):
    np.testing.assert_array_equal(SPACE.decode(SPACE.encode(ALL) + step / 127.5), ALL)


def test_x_beyond_its_range_is_clipped_not_wrapped():
  np.testing.assert_array_equal(SPACE.decode(np.array([-3.0, 3.0, 0.0])), [0, 255, 128])
  np.testing.assert_array_equal(SPACE.decode(np.array([-np.inf, np.inf])), [0, 255])


def mirrored(image, original, off=0.0):
  """Which images are the mirror image of the original, up to `off`; all others are the original itself."""

  def equal(one, other):
    return (np.abs(one.astype(float) - other) <= off).all((1, 2, 3))

  mirror = equal(image, original[:, :, ::-1])
  assert (equal(image, original) ^ mirror).all()
  return mirror


def about(count, share):
  """Whether so many of 4000 are a share, up to 4 standard deviations."""
  return abs(count - 4000 * share) < 4 * np.sqrt(4000 * share * (1 - share))


def test_half_the_images_are_mirrored_left_to_right():
  x = images(4000, 3)
  mirror = mirrored(np.asarray(augment.flip(jax.random.key(0), x)), x)
  assert about(mirror.sum(), 0.5)
  again = mirrored(np.asarray(augment.flip(jax.random.key(1), x)), x)
  assert about((mirror ^ again).sum(), 0.5)


HALF = 0.5 + 2e-5  # float32 is good to 8e-6 of a pixel around x = 1


def off_by(x, image):
  """In pixels."""
  return 127.5 * (np.asarray(x, np.float64) + 1.0) - image


def test_dequantized_pixels_round_to_what_they_were():
  original = images(1000)
  x = SPACE.dequantize(jax.random.key(0), SPACE.encode(original))
  off = off_by(x, original)
  assert -HALF < off.min() < -0.4995 and 0.4995 < off.max() < HALF
  assert np.mean(np.asarray(SPACE.decode(x)) != original) < 1e-4


def test_dequantized_pixels_are_spread_evenly_over_what_rounds_to_them():
  """Kolmogorov and Smirnov's test at the level 0.001, whatever the pixel; no two pixels alike."""
  for value in (0, 100, 255):
    x = SPACE.encode(np.full((16, 8, 8, 3), value, np.uint8))
    off = 127.5 * (np.asarray(SPACE.dequantize(jax.random.key(value), x) - x, np.float64)).ravel()
    share, count = np.sort(off) + 0.5, off.size
    empirical = np.arange(count + 1) / count
    assert max((empirical[1:] - share).max(), (share - empirical[:-1]).max()) < 1.95 / np.sqrt(count)
    assert np.abs(np.corrcoef(off[:-1], off[1:])[0, 1]) < 4 / np.sqrt(count)
    assert len(np.unique(off)) > 0.9 * count


@pytest.mark.parametrize('probability', [0.1, 0.5, 0.9])
def test_labels_are_dropped_with_the_given_probability(probability):
  label = np.arange(4000, dtype=np.int32) % 10
  told = np.asarray(drop(jax.random.key(0), LABEL, {'label': label}, probability)['label'])
  dropped = told == Classes.NONE
  assert about(dropped.sum(), probability) and told.dtype == np.int32
  np.testing.assert_array_equal(told[~dropped], label[~dropped])
  for k in range(10):
    assert dropped[label == k].mean() == pytest.approx(probability, abs=0.1)


def test_no_label_is_dropped_with_probability_zero_and_all_are_with_one():
  label = np.arange(100, dtype=np.int32)
  kept, gone = (drop(jax.random.key(0), LABEL, {'label': label}, p)['label'] for p in (0.0, 1.0))
  np.testing.assert_array_equal(kept, label)
  assert (np.asarray(gone) == Classes.NONE).all()


def test_no_class_is_no_class():
  assert Classes.NONE < 0


@flax.struct.dataclass
class Watching(OneNetwork):
  """A method that trains next to nothing, and reports what it was given."""

  def draw(self, rng, shape):
    return {}

  def loss(self, nets, batch, rng, step):
    return jnp.sum(nets['student'].params ** 2), {'x': batch['x'], **batch['cond']}


IMAGES, LABELS = images(4000, 1), np.arange(4000, dtype=np.int32) % 10


def seen(step, updates=1, **changes):
  """x and labels (4000,) of the last of some updates of the compiled step."""
  recipe = tiny.plan(model__conditional=True)[0][0].recipe
  recipe = recipe.replace(method=Watching(), shape=IMAGES.shape, **changes)
  state = sharding.replicate(recipe.create_state(jnp.ones(1)))
  for _ in range(updates):
    state, metrics = step(recipe, state, {}, sharding.put({'image': IMAGES, 'cond': {'label': LABELS}}))
  return np.asarray(metrics['x']), np.asarray(metrics['label']).astype(int)


def test_training_leaves_images_and_labels_alone_unless_it_is_told(step):
  x, label = seen(step)
  np.testing.assert_allclose(x, SPACE.encode(IMAGES), atol=2e-7)
  np.testing.assert_array_equal(label, LABELS)


def test_training_mirrors_images(step):
  x, label = seen(step, random_flip=True)
  mirror = mirrored(np.asarray(SPACE.decode(x)), IMAGES)
  assert about(mirror.sum(), 0.5)
  np.testing.assert_array_equal(label, LABELS)


def test_training_spreads_pixels(step):
  x, _ = seen(step, dequantize=True)
  off = np.abs(off_by(x, IMAGES))
  assert off.max() < HALF and off.mean() == pytest.approx(0.25, abs=0.01)


def test_training_does_all_of_it_apart_and_anew_at_every_step(step):
  """Which images are mirrored says nothing of which labels are dropped, or of the step before."""
  changes = {'random_flip': True, 'dequantize': True, 'cond_dropout': 0.5}
  mirrors, drops, offs = [], [], []
  for updates in (1, 2):
    x, label = seen(step, updates, **changes)
    mirrors.append(mirrored(off_by(x, 0.0), IMAGES, HALF))
    drops.append(label == Classes.NONE)
    offs.append(off_by(x, np.asarray(SPACE.decode(x))).ravel())
    np.testing.assert_array_equal(label[~drops[-1]], LABELS[~drops[-1]])
  for one, other in ((mirrors, mirrors), (drops, drops), (mirrors, drops)):
    assert about((one[0] ^ other[1]).sum(), 0.5)
  for mirror, gone in zip(mirrors, drops, strict=True):
    assert about(mirror.sum(), 0.5) and about(gone.sum(), 0.5) and about((mirror & gone).sum(), 0.25)
  assert abs(np.corrcoef(*offs)[0, 1]) < 4 / np.sqrt(offs[0].size)


def test_another_seed_is_another_draw(step):
  x, _ = seen(step, random_flip=True)
  other, _ = seen(step, random_flip=True, seed=1)
  assert about((x != other).any((1, 2, 3)).sum(), 0.5)


def latents(**changes):
  """A space of random latents, half the sides of the image, and its autoencoder."""
  vae = AutoencoderKL(
    block_out_channels=(4, 4),
    down_block_types=('DownEncoderBlock2D',) * 2,
    up_block_types=('UpDecoderBlock2D',) * 2,
    norm_num_groups=2,
    **changes,
  )
  params = vae.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']
  return Latents(vae, 'digest', lambda: params), vae, params


@pytest.mark.slow
def test_latents_are_those_of_the_autoencoder_moved_and_scaled():
  space, vae, params = latents(scaling_factor=0.5, shift_factor=0.25)
  image = images(3, 3)
  own = vae.apply({'params': params}, Pixels().encode(image), method='encode').mean
  x = space.encode(image)
  assert x.shape == (3, *space.shape((8, 8, 3))) == (3, 4, 4, 4)
  np.testing.assert_allclose(x, (own - 0.25) * 0.5, atol=1e-6)
  decoded = Pixels().decode(vae.apply({'params': params}, own, method='decode'))
  off = np.abs(np.asarray(space.decode(x), int) - np.asarray(decoded, int))
  assert off.max() <= 1 and space.decode(x).dtype == jnp.uint8


def test_latents_have_no_bounds_and_no_steps():
  space, _, _ = latents()
  x = np.array([[-9.0, 9.0]])
  np.testing.assert_array_equal(space.clip(x), x)
  np.testing.assert_array_equal(space.dequantize(jax.random.key(0), x), x)


def test_spaces_of_latents_are_equal_if_their_autoencoders_are():
  space, vae, _ = latents()
  assert space == Latents(vae, 'digest', dict) and hash(space) == hash(Latents(vae, 'digest', dict))
  assert space not in (Latents(vae, 'other', dict), latents(scaling_factor=1.0)[0], Pixels())


def test_images_that_an_autoencoder_does_not_take_are_refused():
  space, _, _ = latents()
  with pytest.raises(ValueError, match='divisible by 2; these are 7x8'):
    space.shape((7, 8, 3))
  with pytest.raises(ValueError, match='images of 3 channels, not 1'):
    space.shape((8, 8, 1))
