"""DMD2's GAN: both losses in closed form, and whom they move where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.head import Head
from tests.methods.isolation_test import DENOISE, FAKE
from tests.methods.methods_test import GAN

KEY = jax.random.key(0)
X, REAL, EPS = jax.random.normal(KEY, (3, 6, 4, 4, 1))
COND = {'label': jnp.arange(6) % 3}
LOGSNR = jnp.linspace(-4.0, 4.0, 6)
AT = (LOGSNR, COND)


def head(bias=0.3, scale=1.0):
  """A head whose logits are `scale` times what a new one says, and `bias`."""
  params = GAN.init(KEY)
  kernel = scale * params['logit']['kernel']
  return params | {'logit': {'kernel': kernel, 'bias': jnp.full(1, bias)}}


HEAD = head()


def bound(fake_score, head):
  return {'fake_score': Bound(DENOISE, fake_score), 'head': Bound(GAN.head, head)}


def generator_losses(x, fake_score=FAKE, head=HEAD):
  return GAN.generator_losses(bound(fake_score, head), x, EPS, *AT)


def critic_losses(fake, fake_score=FAKE, head=HEAD):
  return GAN.critic_losses(bound(fake_score, head), fake, REAL, *AT)


def logits(z, fake_score=FAKE, head=HEAD):
  return GAN.logits(*bound(fake_score, head).values(), z, *AT)


@pytest.mark.parametrize('logit', [-30.0, -1.5, 0.0, 0.4, 30.0])
def test_losses_of_a_known_logit(logit):
  """softplus(-D), and softplus(D) + softplus(-D) for a critic that says the same of both."""
  certain = head(logit, scale=0.0)
  of_generator, of_critic = np.log1p(np.exp(-logit)), np.log1p(np.exp(logit)) + np.log1p(np.exp(-logit))
  np.testing.assert_allclose(
    generator_losses(X, head=certain), np.full(6, 0.7 * of_generator), rtol=1e-5
  )
  np.testing.assert_allclose(critic_losses(X, head=certain), np.full(6, 0.3 * of_critic), rtol=1e-5)


def test_losses_are_those_of_the_logits_of_noised_images():
  """The generator noises by itself; the critic is given fake and real ones, in that order."""
  z = diffuse(X, EPS, LOGSNR)
  of_fake, of_real = (np.float64(logits(images)) for images in (z, REAL))
  assert np.abs(of_fake - of_real).min() > 1e-3
  np.testing.assert_allclose(generator_losses(X), 0.7 * np.log1p(np.exp(-of_fake)), rtol=1e-5)
  expected = 0.3 * (np.log1p(np.exp(of_fake)) + np.log1p(np.exp(-of_real)))
  np.testing.assert_allclose(critic_losses(z), expected, rtol=1e-5)


@pytest.mark.parametrize('bias', [-20.0, 0.0, 20.0])
def test_the_generators_gradient_does_not_vanish_where_the_critic_is_sure(bias):
  """-w sigmoid(-D) dD/dx: all of it where D = -20, none where D = 20."""

  def of_image(x, loss):
    return jnp.sum(loss(x))

  biased = head(bias)
  slope = jax.grad(of_image)(X, lambda x: generator_losses(x, head=biased))
  of_logit = jax.grad(of_image)(X, lambda x: logits(diffuse(x, EPS, LOGSNR), head=biased))
  share = 0.7 / (1.0 + np.exp(np.float64(logits(diffuse(X, EPS, LOGSNR), head=biased))))
  assert np.abs(of_logit).max(axis=(1, 2, 3)).min() > 1e-4
  expected = -share[:, None, None, None] * of_logit
  np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_a_step_of_the_generator_raises_the_logit_and_one_of_the_critic_parts_real_from_fake():
  slope = jax.grad(lambda x: jnp.sum(generator_losses(x)))(X)
  before, after = (logits(diffuse(x, EPS, LOGSNR)) for x in (X, X - 0.01 * slope))
  assert (after > before).all()

  z = diffuse(X, EPS, LOGSNR)
  critic = (FAKE, HEAD)
  slopes = jax.grad(lambda critic: jnp.sum(critic_losses(z, *critic)))(critic)
  moved = jax.tree.map(lambda p, g: p - 1e-3 * g, critic, slopes)
  gap, wider = (jnp.mean(logits(REAL, *c) - logits(z, *c)) for c in (critic, moved))
  assert wider > gap


def test_the_generators_loss_moves_images_alone_and_the_critics_moves_head_and_activations_alone():
  def moved(loss):
    def total(images, fake_score, head):
      return jnp.sum(loss(images, fake_score, head))

    gradient = jax.grad(total, argnums=(0, 1, 2))(X, FAKE, HEAD)
    flat, _ = jax.tree_util.tree_flatten_with_path(
      dict(zip(('x', 'fake', 'head'), gradient, strict=True))
    )
    return {jax.tree_util.keystr(path, simple=True, separator='/') for path, g in flat if g.any()}

  assert moved(generator_losses) == {'x'}
  flat, _ = jax.tree_util.tree_flatten_with_path({'fake': FAKE, 'head': HEAD})
  all_leaves = {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in flat}
  assert moved(critic_losses) == all_leaves - {
    'fake/outer'
  }  # which comes after the innermost activations


def test_a_logit_is_of_its_image_alone_at_any_size():
  whole = logits(X)
  each = [jax.tree.map(lambda a, k=k: a[k : k + 1], (X, *AT)) for k in range(6)]
  alone = [GAN.logits(*bound(FAKE, HEAD).values(), *at)[0] for at in each]
  np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-6)
  assert np.std(whole) > 1e-3
  for size in (1, 2, 5):
    assert Head().apply({'params': HEAD}, jnp.ones((3, size, size, GAN.width))).shape == (3,)


@pytest.mark.parametrize('width', [8, 16])
def test_the_narrowest_head_sees_how_strong_an_activation_is(width):
  """Channels that are normalized each by itself would all look alike."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(1, 2, 2, width)).astype(np.float32)
  stronger = h * np.where(np.arange(width) % 2, 1.0, 4.0).astype(np.float32)
  params = Head().init(KEY, h)
  params['params']['conv0']['kernel'] = np.eye(width, dtype=np.float32)[None, None] * (
    np.arange(9).reshape(3, 3, 1, 1) == 4
  )
  logits = [float(Head().apply(params, x)[0]) for x in (h, stronger)]
  assert abs(logits[0] - logits[1]) > 1e-3
