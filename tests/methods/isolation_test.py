"""Which loss moves which network: gradients leaf by leaf, and what an update leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.process import diffuse, from_v
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.methods import DMD
from diffusion_distillation.methods.gan import Head
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe
from tests.methods.methods_test import GAN, KEY, SCHEDULE, SHAPE, VARIANTS, dmd2, every_variant, given


@dataclasses.dataclass(frozen=True)
class Pointwise:
  """A denoiser that compiles at once: two dense layers, of each pixel by itself."""

  def init(self, rng):
    shapes = {'inner': (1, GAN.width), 'time': (GAN.width,), 'classes': (3, GAN.width)}
    shapes['outer'] = (GAN.width, 1)
    keys = jax.random.split(rng, len(shapes))
    return {name: jax.random.normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}

  def bottleneck(self, params, z, logsnr, label):
    about = 0.1 * logsnr[:, None] * params['time'][None, :] + params['classes'][label]
    return jnp.tanh(z @ params['inner'] + about[:, None, None, :])

  def __call__(self, params, z, logsnr, label, rng=None):
    return from_v(z, logsnr, self.bottleneck(params, z, logsnr, label) @ params['outer'])


DENOISE = Pointwise()
STUDENT, FAKE, TEACHER, AVERAGE = map(DENOISE.init, jax.random.split(KEY, 4))
FROZEN = {'teacher': TEACHER, 'average': AVERAGE}


def networks(method):
  """Those that it trains, each with parameters of its own."""
  params = method.init(STUDENT, FAKE, KEY)
  if 'head' in params:
    params['head']['logit']['bias'] += 0.3
  return params


def recipe_of(method):
  rates = {'student': 0.01, 'fake_score': 0.02, 'head': 0.03}
  return Recipe(
    denoise=DENOISE,
    method=method,
    optimizer=Adam(clip_norm=1.0, weight_decay=0.1),
    learning_rate={name: LearningRate(rate, 100) for name, rate in rates.items()},
    ema_decay=(0.9, 0.99),
    seed=0,
  )


@jax.jit
def gradients(method, params, batch):
  """What an update is made from, {network: gradient}."""
  return update.gradients(recipe_of(method), params, FROZEN, batch, KEY, jnp.array(3))[2]


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other):
  """Up to rounding in float32, as a share of the largest entry of each array."""

  def check(a, b):
    assert np.abs(b).max() > 1e-4
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

  jax.tree.map(check, tree, other)


@every_variant
def test_an_update_has_gradients_of_the_networks_in_their_turn_and_of_no_others(method):
  for step in range(method.period):
    turn = method.at(step)
    moved = jax.eval_shape(gradients, turn, networks(turn), given(turn))
    assert set(moved) == set(turn.networks)


@every_variant
def test_nothing_frozen_has_a_gradient(method):
  @jax.jit
  @jax.grad
  def slopes(frozen, params, batch):
    return method.loss(DENOISE, params, frozen, batch, None, jnp.array(3))[0]

  got = slopes(FROZEN, networks(method), given(method))
  assert_same(got, jax.tree.map(np.zeros_like, FROZEN))


def test_the_target_of_consistency_has_no_gradient_where_it_is_the_student_itself():
  """It is as if the average were what the student is at this moment."""
  follows = dataclasses.replace(VARIANTS['consistency'], follows_average=True)
  itself = dataclasses.replace(follows, follows_average=False)

  @jax.jit
  @jax.grad
  def slopes(student, method, batch):
    frozen = {'teacher': TEACHER, 'average': STUDENT}
    return method.loss(DENOISE, {'student': student}, frozen, batch, None, jnp.array(3))[0]

  batch = given(itself)
  assert_close(slopes(STUDENT, itself, batch), slopes(STUDENT, follows, batch))


MATCHING = {
  'pairs': DMD(SCHEDULE, SnrTrunc(), regression=0.4),
  'pairs_and_gan': DMD(SCHEDULE, SnrTrunc(), regression=0.4, gan=GAN),
  'two_time_scales': dmd2(fake_updates=2),
  'simulated': dmd2(num_steps=3),
  'noised_data': dmd2(num_steps=3, simulated=False),
}


def own_losses(method, params, batch):
  """{network: the loss that moves it, of its own parameters}, written out; all else is constant."""
  label, fake_score, head = batch['label'], params['fake_score'], params.get('head')
  x = method.generate(DENOISE, params['student'], batch, None)

  def logit(fake_score, head, images):
    logsnr = SCHEDULE(batch['gan_t'])
    h = DENOISE.bottleneck(fake_score, diffuse(images, batch['gan_eps'], logsnr), logsnr, label)
    return Head().apply({'params': head}, h)

  def critic(fake_score, head):
    of_fake, of_real = (logit(fake_score, head, images) for images in (x, batch['x']))
    return GAN.fake_weight * jnp.mean(jnp.log1p(jnp.exp(of_fake)) + jnp.log1p(jnp.exp(-of_real)))

  def of_student(student):
    images = method.generate(DENOISE, student, batch, None)
    logsnr = SCHEDULE(batch['t'])
    z = diffuse(x, batch['eps'], logsnr)
    fake, real = (DENOISE(p, z, logsnr, label).x for p in (fake_score, TEACHER))
    scale = jnp.mean(jnp.abs(x - real), (1, 2, 3), keepdims=True)
    total = jnp.mean(images * (fake - real) / scale)
    if method.regression:
      pairs = batch['pairs']
      drawn = DENOISE(student, pairs['noise'], SCHEDULE(jnp.ones(len(x))), pairs['label']).x
      total += method.regression * jnp.mean(jnp.square(drawn - pairs['image']))
    if method.gan:
      total += GAN.generator_weight * jnp.mean(jnp.log1p(jnp.exp(-logit(fake_score, head, images))))
    return total

  def of_fake_score(fake_score):
    logsnr = SCHEDULE(batch['fake_t'])
    z = diffuse(x, batch['fake_eps'], logsnr)
    errors = jnp.square(DENOISE(fake_score, z, logsnr, label).x - x)
    total = jnp.mean(jnp.maximum(jnp.exp(logsnr), 1.0)[:, None, None, None] * errors)
    return total + critic(fake_score, head) if method.gan else total

  losses = {'student': of_student, 'fake_score': of_fake_score}
  return losses | {'head': functools.partial(critic, fake_score)} if method.gan else losses


@pytest.mark.parametrize('method', MATCHING.values(), ids=MATCHING)
def test_each_network_of_dmd_is_moved_by_its_own_loss_alone(method):
  """Generator: matching, pairs and its GAN loss; fake score: denoising and the critic's; head: that."""

  @jax.jit
  def gradients_alone(params, batch):
    losses = own_losses(method, params, batch)
    return {name: jax.grad(loss)(params[name]) for name, loss in losses.items()}

  arguments = (networks(method), given(method))
  alone = gradients_alone(*arguments)
  turn, other = (dataclasses.replace(method, generator_turn=on) for on in (True, False))
  assert_close(gradients(turn, *arguments), alone)
  del alone['student']
  assert_close(gradients(other, *arguments), alone)


def updated(method, state):
  """One update of `state` from an arbitrary batch, by the training step."""
  image = jnp.uint8(jax.random.randint(KEY, SHAPE, 0, 256))
  batch = {'image': image, 'label': jnp.arange(SHAPE[0]) % 3, 'pairs': given(method)['pairs']}
  return jax.jit(update.train_step)(recipe_of(method), state, {'teacher': TEACHER}, batch)[0]


def test_an_update_leaves_the_generator_its_moments_and_averages_as_they_are_out_of_turn():
  method = MATCHING['two_time_scales']
  before = recipe_of(method).create_state(STUDENT, TEACHER)
  before = updated(dataclasses.replace(method, generator_turn=True), before)  # moments that are not zero
  turn, other = (updated(dataclasses.replace(method, generator_turn=on), before) for on in (True, False))
  assert_same(other.params['student'], before.params['student'])
  assert_same(other.opt_state['student'], before.opt_state['student'])
  assert_same(other.ema_params, before.ema_params)
  for after, moved in ((turn, ('student', 'fake_score', 'head')), (other, ('fake_score', 'head'))):
    for network in moved:
      for part in ('params', 'opt_state'):
        old, new = (jax.tree.leaves(getattr(state, part)[network]) for state in (before, after))
        assert all((a != b).any() for a, b in zip(old, new, strict=True)), (network, part)
  for old, new in zip(before.ema_params, turn.ema_params, strict=True):
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), old, new))
