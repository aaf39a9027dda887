"""DMD2's GAN: both losses in closed form, and whom they move where."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.methods import Gan
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.head import Head, StridedHead
from tests.methods.isolation_test import DENOISE, FAKE
from tests.methods.methods_test import GAN

STRIDED = Gan(width=6, generator_weight=0.7, fake_weight=0.3, module=StridedHead())
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
  np.testing.assert_allclose(generator_losses(X, head=certain), np.full(6, of_generator), rtol=1e-5)
  np.testing.assert_allclose(critic_losses(X, head=certain), np.full(6, of_critic), rtol=1e-5)


def test_losses_are_those_of_the_logits_of_noised_images():
  """The generator noises by itself; the critic is given fake and real ones, in that order."""
  z = diffuse(X, EPS, LOGSNR)
  of_fake, of_real = (np.float64(logits(images)) for images in (z, REAL))
  assert np.abs(of_fake - of_real).min() > 1e-3
  np.testing.assert_allclose(generator_losses(X), np.log1p(np.exp(-of_fake)), rtol=1e-5)
  expected = np.log1p(np.exp(of_fake)) + np.log1p(np.exp(-of_real))
  np.testing.assert_allclose(critic_losses(z), expected, rtol=1e-5)


@pytest.mark.parametrize('bias', [-20.0, 0.0, 20.0])
def test_the_generators_gradient_does_not_vanish_where_the_critic_is_sure(bias):
  """-sigmoid(-D) dD/dx: all of it where D = -20, none where D = 20."""

  def of_image(x, loss):
    return jnp.sum(loss(x))

  biased = head(bias)
  slope = jax.grad(of_image)(X, lambda x: generator_losses(x, head=biased))
  of_logit = jax.grad(of_image)(X, lambda x: logits(diffuse(x, EPS, LOGSNR), head=biased))
  share = 1.0 / (1.0 + np.exp(np.float64(logits(diffuse(X, EPS, LOGSNR), head=biased))))
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


def strided(params, h):
  """The head of DMD2's code in float64, activations (h, w, c) of one image: both convolutions written out."""

  def conv(h, layer, stride):
    kernel, bias = (np.float64(params[layer][key]) for key in ('kernel', 'bias'))
    size, places = kernel.shape[0], [range(0, n - kernel.shape[0] + 1, stride) for n in h.shape[:2]]
    rows = [
      [np.tensordot(h[i : i + size, j : j + size], kernel, 3) + bias for j in places[1]]
      for i in places[0]
    ]
    return np.array(rows)

  def norm_and_silu(h, layer):
    groups = h.reshape(*h.shape[:2], -1, 2)  # two channels each, as there are fewer than 64
    mean, var = groups.mean((0, 1, 3), keepdims=True), groups.var((0, 1, 3), keepdims=True)
    h = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(h.shape)
    h = h * np.float64(params[layer]['scale']) + np.float64(params[layer]['bias'])
    return h / (1.0 + np.exp(-h))

  h = norm_and_silu(conv(np.pad(h, ((1, 1), (1, 1), (0, 0))), 'conv0', 2), 'norm0')
  h = norm_and_silu(conv(h, 'conv1', 4), 'norm1')
  return conv(h, 'logit', 1).mean()


@pytest.mark.parametrize('size', [8, 16])
def test_the_strided_head_is_two_convolutions_to_one_logit_for_each_8x8(size):
  rng = np.random.default_rng(0)
  h = rng.normal(size=(2, size, size, 6)).astype(np.float32)
  params = STRIDED.init(KEY)
  params = jax.tree.map(lambda p: p + jnp.float32(0.1 * rng.normal(size=p.shape)), params)
  expected = [strided(params, np.float64(image)) for image in h]
  np.testing.assert_allclose(STRIDED.head(params, h), expected, rtol=1e-4, atol=1e-5)
  assert np.ptp(expected) > 1e-2


def test_the_strided_head_looks_after_the_encoder_and_the_pooled_one_innermost():
  places = []

  class Score:
    def bottleneck(self, z, logsnr, cond, place):
      places.append(place)
      return jnp.ones((len(z), 8, 8, 6))

  for gan in (STRIDED, STRIDED.replace(module=Head())):
    logits = jax.eval_shape(lambda gan=gan: gan.logits(Score(), Bound(gan.head, gan.init(KEY)), X, *AT))
    assert logits.shape == (6,)
  assert places == ['encoded', 'h']


def test_times_run_from_the_first_to_the_last_and_are_never_0():
  """At t = 0, which the generator of uniform numbers does draw, no network is called."""
  with mock.patch.object(
    jax.random, 'uniform', lambda rng, shape, minval, maxval: jnp.full(shape, minval)
  ):
    assert (GAN.draw_times(KEY, 3) > 0.0).all()
    np.testing.assert_array_equal(GAN.replace(first_t=0.25).draw_times(KEY, 3), np.float32(0.25))
  assert stats.kstest(GAN.draw_times(KEY, 2000), 'uniform').pvalue > 0.01
  for fields in ({'first_t': -0.1}, {'last_t': 1.1}, {'first_t': 0.5, 'last_t': 0.5}):
    with pytest.raises(ValueError, match='0 <= gan_first_t < gan_last_t <= 1'):
      GAN.replace(**fields)
