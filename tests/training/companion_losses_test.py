"""The losses of an autoencoder and of a text encoder, in closed form."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.autoencoder_kl import Gaussian
from diffusion_distillation.training import autoencoding, contrastive
from tests import text_model


def test_the_divergence_is_that_of_gaussians():
  """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1) / 2 - log s."""
  mean = jnp.array([0.0, 1.0, -2.0, 0.5]).reshape(2, 1, 1, 2)
  spread = np.array([1.0, 1.0, 0.5, 3.0])
  found = Gaussian(mean, 2.0 * jnp.log(spread).reshape(2, 1, 1, 2)).divergence()
  each = (np.square(mean).ravel() + spread**2 - 1.0) / 2.0 - np.log(spread)
  np.testing.assert_allclose(found, [each[:2].sum(), each[2:].sum()], rtol=1e-6)


def test_the_loss_is_the_error_of_a_pixel_and_its_share_of_the_divergence():
  params = text_model.random(text_model.VAE.init, np.zeros((1, *text_model.IMAGE), np.float32))['params']
  x = jax.random.uniform(jax.random.key(0), (3, *text_model.IMAGE), minval=-1.0)
  key = jax.random.key(1)

  @jax.jit
  def compute(params):
    apply = functools.partial(text_model.VAE.apply, {'params': params})
    latents = apply(x, method='encode')
    decoded = apply(latents.sample(key), method='decode')
    return autoencoding.losses(text_model.VAE, params, x, key, 0.5), latents.divergence(), decoded

  found, divergence, decoded = compute(params)
  assert float(found.error) == pytest.approx(float(jnp.square(decoded - x).mean()), rel=1e-5)
  assert float(found.divergence) == pytest.approx(float(divergence.mean()), rel=1e-5)
  pixels = math.prod(text_model.IMAGE)
  expected = found.error + 0.5 * found.divergence / pixels
  assert float(found.loss) == pytest.approx(float(expected), rel=1e-6)


def test_scaled_latents_have_unit_variance():
  latents = 3.0 + 0.2 * np.random.default_rng(0).standard_normal((50, 4, 4, 2)).astype(np.float32)
  factor = autoencoding.scaling_factor(latents)
  assert np.std(factor * latents) == pytest.approx(1.0, rel=1e-5) and factor == pytest.approx(5, rel=0.1)


def test_the_contrastive_loss_at_known_embeddings():
  """For orthogonal pairs: -log(e^s / (e^s + B - 1)); for equal embeddings: log B."""
  count, scale = 4, 3.0
  tokens, eye = jnp.arange(count)[:, None], jnp.eye(count)
  scaled = contrastive.logits(2.0 * eye, 3.0 * eye, jnp.log(scale))
  np.testing.assert_allclose(scaled, scale * np.eye(count), rtol=1e-6)
  expected = math.log(1.0 + (count - 1) * math.exp(-scale))
  assert float(contrastive.loss(scaled, tokens)) == pytest.approx(expected, rel=1e-6)
  assert float(contrastive.accuracy(scaled, tokens)) == 1.0
  same = contrastive.logits(jnp.ones((count, 2)), jnp.ones((count, 2)), jnp.log(scale))
  assert float(contrastive.loss(same, tokens)) == pytest.approx(math.log(count), rel=1e-6)


def test_the_scale_of_the_cosines_is_at_most_100():
  largest = contrastive.bound({'text': {}, 'log_scale': jnp.array(9.0)})['log_scale']
  scaled = contrastive.logits(jnp.eye(2), jnp.eye(2), largest)
  assert float(jnp.max(scaled)) == pytest.approx(100.0, rel=1e-5)
  assert contrastive.bound({'log_scale': jnp.array(3.0)}) == {'log_scale': 3.0}


def test_copies_of_a_text_in_a_batch_share_its_images():
  """Two copies of one text, each image nearer to the other one's: (log(1 + e^2) + log(1 + e^-2)) / 2, and both are right."""
  tokens, scaled = jnp.array([[1, 2], [1, 2]]), jnp.array([[0.0, 2.0], [2.0, 0.0]])
  expected = 0.5 * (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2)))
  assert float(contrastive.loss(scaled, tokens)) == pytest.approx(expected, rel=1e-6)
  assert float(contrastive.accuracy(scaled, tokens)) == 1.0
  others = jnp.array([[1, 2], [1, 3]])
  assert float(contrastive.loss(scaled, others)) == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)
  assert float(contrastive.accuracy(scaled, others)) == 0.0


def test_the_loss_counts_both_directions_equally():
  scaled, tokens = jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([[0], [1]])
  of_images = 0.5 * (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2)))
  of_texts = math.log(2.0)
  assert float(contrastive.loss(scaled, tokens)) == pytest.approx(0.5 * (of_images + of_texts), rel=1e-6)
