"""Texts as conditions of every method, and distances of decoded latents."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.process import diffuse, from_eps
from diffusion_distillation.diffusion.weightings import Snr
from diffusion_distillation.methods import DMD, Knowledge
from diffusion_distillation.methods.distances import L2, Decoded, PseudoHuber
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Text
from diffusion_distillation.networks.spaces import Decoder
from diffusion_distillation.training import augment, step
from tests import text_model
from tests.methods.methods_test import nets

KEY = jax.random.key(0)
SHAPE = (4, 3, 3, 2)
SCHEDULE = Discrete('scaled_linear', 1000, 0.00085, 0.012)


@dataclasses.dataclass(frozen=True)
class Told:
  """A denoiser that compiles at once: eps is a matrix of each latent pixel, shifted by a matrix of the mean token."""

  conditioning: ClassVar = {'text': Text(5, 3)}

  def init(self, rng):
    return {
      'pixel': 0.5 * jax.random.normal(rng, (2, 2)),
      'text': jax.random.normal(jax.random.fold_in(rng, 1), (3, 2)),
    }

  def __call__(self, params, z, logsnr, cond, rng=None):
    about = jnp.mean(cond['text'], 1) @ params['text'] * jax.nn.sigmoid(logsnr)[:, None]
    return from_eps(z, logsnr, z @ params['pixel'] + about[:, None, None, :])


STUDENT, FAKE, TEACHER = map(Told().init, jax.random.split(KEY, 3))
bound = functools.partial(nets, student=Told())


def normal(number, *shape):
  return jax.random.normal(jax.random.fold_in(KEY, number), shape)


COND = {'text': normal(1, 4, 5, 3), 'no_text': jnp.broadcast_to(normal(2, 1, 5, 3), (4, 5, 3))}


def batch_of(method):
  pairs = {'noise': normal(3, *SHAPE), 'image': normal(4, *SHAPE), 'cond': COND}
  return {'cond': COND, 'pairs': pairs, **method.draw(KEY, SHAPE)}


def guided_by_hand(z, logsnr, weight):
  """The teacher's x, extrapolated from the one for no text."""
  told, blank = (Told()(TEACHER, z, logsnr, {'text': COND[key]}).x for key in ('text', 'no_text'))
  return told + weight * (told - blank)


def test_the_real_score_is_guided_away_from_the_empty_text_and_the_fake_one_is_not():
  method = DMD(SCHEDULE, Snr(), regression=0.0, guidance=7.0)
  params, batch = {'student': STUDENT, 'fake_score': FAKE}, batch_of(method)

  @jax.jit
  def gradient(x):
    held = bound(method, params, {'teacher': TEACHER})
    return jax.grad(lambda x: jnp.sum(method.matching_losses(held, x, batch)[0]))(x)

  x = normal(5, *SHAPE)
  logsnr = SCHEDULE(batch['t'])
  z = diffuse(x, batch['eps'], logsnr)
  real, fake = guided_by_hand(z, logsnr, 7.0), Told()(FAKE, z, logsnr, COND).x
  expected = (fake - real) / jnp.mean(jnp.abs(x - real), (1, 2, 3), keepdims=True) / x[0].size
  np.testing.assert_allclose(gradient(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('guidance', [0.0, 7.0])
def test_each_network_that_is_told_a_text_is_moved_by_its_own_loss_alone(guidance):
  method = DMD(SCHEDULE, Snr(), regression=0.25, guidance=guidance)
  params, batch = {'student': STUDENT, 'fake_score': FAKE}, batch_of(method)

  @jax.jit
  def slopes(params, frozen):
    def loss(params, frozen):
      return method.loss(bound(method, params, frozen), batch, None, jnp.array(0))[0]

    return jax.grad(loss, argnums=(0, 1))(params, frozen)

  of_trained, of_frozen = slopes(params, {'teacher': TEACHER})
  jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0.0), of_frozen)
  assert all(np.abs(leaf).max() > 0.0 for leaf in jax.tree.leaves(of_trained))
  x = Told()(STUDENT, batch['z'], SCHEDULE(jnp.ones(4)), COND).x
  alone = jax.grad(
    lambda fake: jnp.mean(method.fake_losses(lambda *args: Told()(fake, *args), x, batch, None))
  )(FAKE)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), of_trained['fake_score'], alone
  )


def test_texts_are_dropped_together_with_what_they_become():
  told = Told().conditioning
  found = conditioning.drop(KEY, told, COND, 0.5)
  dropped = np.asarray(jax.random.bernoulli(KEY, 0.5, (4,)))
  assert 0 < dropped.sum() < 4
  expected = np.where(dropped[:, None, None], COND['no_text'], COND['text'])
  np.testing.assert_array_equal(found['text'], expected)
  np.testing.assert_array_equal(found['no_text'], COND['no_text'])
  examples = conditioning.examples(told, 2)
  assert {key: value.shape for key, value in examples.items()} == dict.fromkeys(COND, (2, 5, 3))
  assert conditioning.examples({}, 2) is None


def test_encoded_images_are_x_as_they_are(monkeypatch):
  monkeypatch.setattr(augment, 'flip', None)
  x = normal(6, *SHAPE)

  class Recipe:
    method, shape, space = Knowledge(SCHEDULE), SHAPE, None
    random_flip = dequantize = False
    cond_dropout, conditioning = 0.0, Told().conditioning

  found = step.make_examples(Recipe, {'x': x, 'cond': COND}, KEY, KEY)
  np.testing.assert_array_equal(found['x'], x)
  assert found['cond'] is COND


@pytest.mark.slow
@pytest.mark.parametrize('inner', [L2(), PseudoHuber(0.1)])
def test_a_distance_of_decoded_latents_is_that_of_their_images(inner):
  """Its gradient is in latents; the decoder's parameters are an argument."""
  stored = text_model.stored()
  params, vae = stored.space.weights(), stored.space.vae
  distance = Decoded(inner, stored.space.decoder)
  weights = {'decoder': params, 'distance': None}
  x, y = normal(7, 2, *text_model.LATENT), normal(8, 2, *text_model.LATENT)
  value, slope = jax.jit(jax.value_and_grad(lambda x: distance(x, y, weights).sum()))(x)
  of_x, of_y = (vae.apply({'params': params}, vae.unscaled(h), method='decode') for h in (x, y))
  np.testing.assert_allclose(value, inner(of_x, of_y).sum(), rtol=1e-4)
  assert slope.shape == x.shape and np.abs(slope).max() > 0.0
  assert distance.decode == Decoder(vae) and hash(distance) == hash(Decoded(inner, Decoder(vae)))
