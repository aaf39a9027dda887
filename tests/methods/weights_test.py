"""The weights of a loss's parts, and of the distance between images."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.methods.distances import L2
from tests.methods.methods_test import FROZEN, VARIANTS, given, nets, shifts


@dataclasses.dataclass(frozen=True)
class Scaled:
  """A distance that has weights."""

  def __call__(self, x, y, weights=None):
    return weights * L2()(x, y)


@pytest.mark.parametrize('name', ['dmd', 'knowledge', 'consistency'])
def test_the_weights_of_a_distance_reach_it(name):
  method, data = VARIANTS[name], given(VARIANTS[name])

  def loss(distance, frozen=FROZEN):
    chosen = dataclasses.replace(method, distance=distance)
    return chosen.loss(nets(chosen, shifts(method), frozen), data, None, 0)[0]

  none, once, thrice = (loss(Scaled(), FROZEN | {'distance': jnp.array(w)}) for w in (0.0, 1.0, 3.0))
  assert once > none
  np.testing.assert_allclose(once, loss(L2()), rtol=1e-5)
  np.testing.assert_allclose(thrice - none, 3 * (once - none), rtol=1e-4)


def test_the_weight_of_a_regression_reaches_it():
  method, rest = VARIANTS['dmd'], []
  for weight in (0.5, 4.0):
    chosen = dataclasses.replace(method, regression=weight)
    loss, metrics = chosen.loss(nets(chosen, shifts(method), FROZEN), given(method), None, 0)
    rest.append(loss - weight * metrics['regression'])
  assert metrics['regression'] > 0.01
  np.testing.assert_allclose(rest[0], rest[1], rtol=1e-4)


def test_losses_of_a_gan_are_reported_before_their_weights():
  method, rest = VARIANTS['dmd2'], []
  for weight in (0.5, 4.0):
    gan = method.gan.replace(generator_weight=weight, fake_weight=3.0 * weight)
    chosen = dataclasses.replace(method, gan=gan).at(method.period - 1)
    loss, metrics = chosen.loss(nets(chosen, shifts(method), FROZEN), given(chosen), None, 0)
    assert min(metrics['gan_loss'], metrics['critic_loss']) > 0.1
    rest.append(loss - weight * metrics['gan_loss'] - 3.0 * weight * metrics['critic_loss'])
  np.testing.assert_allclose(rest[0], rest[1], rtol=1e-4)
