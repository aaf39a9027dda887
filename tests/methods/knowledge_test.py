"""Knowledge distillation: regression on stored pairs, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.methods import Knowledge, distances
from tests.exact import Gaussian
from tests.methods.methods_test import nets

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
KEY = jax.random.key(0)
METHOD = Knowledge(SCHEDULE)


def linear(params, z, logsnr, cond, rng=None):
  x = params['scale'] * z + params['shift']
  return Prediction(x, jnp.full_like(x, jnp.nan))  # which is none of its business


def pairs(noise, image):
  return {'pairs': {'noise': noise, 'image': image, 'cond': None}}


def loss(method, scale, shift, batch):
  student = {'student': {'scale': scale, 'shift': shift}}
  return method.loss(nets(method, student, student=linear), batch, None, 0)[0]


NOISE, SCATTER = jax.random.normal(KEY, (2, 16, 3, 2, 1))


def test_the_best_linear_student_is_the_regression_of_images_on_noise():
  """Least squares by NumPy: there the gradient is zero, and the loss the mean square of what is left."""
  image = 0.5 * NOISE - 0.2 + 0.3 * SCATTER
  (scale, shift), (left, *_) = np.polyfit(np.ravel(NOISE), np.ravel(image), 1, full=True)[:2]
  batch = pairs(NOISE, image)
  assert loss(METHOD, scale, shift, batch) == pytest.approx(left / image.size, rel=1e-5)
  slopes = jax.grad(loss, argnums=(1, 2))(METHOD, scale, shift, batch)
  np.testing.assert_allclose(slopes, 0.0, atol=1e-6)
  for off in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
    expected = np.mean(np.square((scale + off[0]) * NOISE + shift + off[1] - image))
    assert loss(METHOD, scale + off[0], shift + off[1], batch) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_zero_at_the_teachers_own_map():
  image = GAUSSIAN.consistency(NOISE, SCHEDULE(jnp.ones(16)))
  batch = pairs(NOISE, image)
  assert loss(METHOD, 0.5, 0.3, batch) < 1e-8
  assert loss(METHOD, -0.5, 0.3, batch) > 0.5  # the same law, but other images


def test_the_student_is_asked_once_at_the_end_of_time_of_the_pairs_noise_and_label():
  """Nothing else of the batch is looked at, and no other network."""
  calls = []

  def recording(params, *asked):
    calls.append(asked)
    return linear(params, *asked)

  cond = {'label': jnp.arange(16) % 7}
  batch = {'pairs': {'noise': NOISE, 'image': NOISE, 'cond': cond}}
  held = nets(METHOD, {'student': {'scale': 1.0, 'shift': 0.0}}, student=recording)
  assert set(held) == {'student', 'distance'}
  METHOD.loss(held, batch, KEY, 0)
  ((z, logsnr, told, rng),) = calls
  np.testing.assert_array_equal(z, NOISE)
  np.testing.assert_array_equal(logsnr, np.full(16, SCHEDULE(jnp.array(1.0))))
  np.testing.assert_array_equal(told['label'], cond['label'])
  assert rng is KEY
  assert METHOD.draw(KEY, NOISE.shape) == {}


def test_the_distance_is_that_given():
  batch, params = pairs(NOISE, NOISE + 0.5), {'student': {'scale': 1.0, 'shift': 0.0}}
  huber = Knowledge(SCHEDULE, distances.PseudoHuber(1.2))
  got = huber.loss(nets(huber, params, student=linear), batch, None, 0)[0]
  assert got == pytest.approx(np.hypot(0.5, 1.2) - 1.2, rel=1e-5)
