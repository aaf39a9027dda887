"""Which loss moves which network: gradients leaf by leaf, and what an update leaves alone."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion.process import diffuse, from_v, from_x
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.methods import DMD
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.head import Head
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe
from tests.methods.methods_test import (
  GAN,
  KEY,
  SCHEDULE,
  SHAPE,
  VARIANTS,
  dmd2,
  every_variant,
  given,
  nets,
)


def normals(rng, shapes):
  """Parameters of these shapes, by name."""
  keys = jax.random.split(rng, len(shapes))
  return {name: jax.random.normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}


@dataclasses.dataclass(frozen=True)
class Pointwise:
  """A denoiser that compiles at once: two dense layers, of each pixel by itself."""

  conditioning: ClassVar = {'label': Classes(3)}

  def init(self, rng):
    shapes = {'inner': (1, GAN.width), 'time': (GAN.width,), 'classes': (3, GAN.width)}
    shapes['outer'] = (GAN.width, 1)
    return normals(rng, shapes)

  def bottleneck(self, params, z, logsnr, cond, place='h'):
    about = 0.1 * logsnr[:, None] * params['time'][None, :] + params['classes'][cond['label']]
    return jnp.tanh(z @ params['inner'] + about[:, None, None, :])

  def __call__(self, params, z, logsnr, cond, rng=None):
    return from_v(z, logsnr, self.bottleneck(params, z, logsnr, cond) @ params['outer'])


@dataclasses.dataclass(frozen=True)
class Neighbours:
  """Another network: of two pixels, a layer more, told neither time nor class; it predicts x, not v."""

  conditioning: ClassVar = {}

  def init(self, rng):
    shapes = {'first': (2, 24), 'second': (24, GAN.width), 'last': (GAN.width, 1)}
    return normals(rng, shapes)

  def bottleneck(self, params, z, logsnr, cond, place='h'):
    both = jnp.concatenate([z, jnp.roll(z, 1, axis=2)], -1)
    return jnp.tanh(jnp.tanh(both @ params['first']) @ params['second'])

  def __call__(self, params, z, logsnr, cond, rng=None):
    return from_x(z, logsnr, self.bottleneck(params, z, logsnr, cond) @ params['last'])


DENOISE, OTHER = Pointwise(), Neighbours()
STUDENT, FAKE, TEACHER, AVERAGE = map(DENOISE.init, jax.random.split(KEY, 4))
OTHER_TEACHER, OTHER_FAKE = map(OTHER.init, jax.random.split(KEY))
FROZEN = {'teacher': TEACHER, 'average': AVERAGE, 'distance': None}
bound = functools.partial(nets, student=DENOISE)
STEP = jax.jit(update.train_step)


def networks(method, fake_score=FAKE):
  """The parameters of those that it trains, each its own."""
  params = method.init(STUDENT, fake_score, KEY)
  if 'head' in params:
    params['head']['logit']['bias'] += 0.3
  return params


def recipe_of(method, teacher=DENOISE):
  rates = {'student': 0.01, 'fake_score': 0.02, 'head': 0.03}
  return Recipe(
    networks=FrozenDict(method.networks(DENOISE, teacher)),
    method=method,
    optimizer=Adam(clip_norm=1.0, weight_decay=0.1),
    learning_rate={name: LearningRate(rate, 100) for name, rate in rates.items()},
    ema_decay=(0.9, 0.99),
    seed=0,
    space=Pixels(),
    shape=SHAPE,
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
    assert set(moved) == set(turn.trained)


@every_variant
def test_nothing_frozen_has_a_gradient(method):
  @jax.jit
  @jax.grad
  def slopes(frozen, params, batch):
    return method.loss(bound(method, params, frozen), batch, None, jnp.array(3))[0]

  got = slopes(FROZEN, networks(method), given(method))
  assert_same(got, jax.tree.map(np.zeros_like, FROZEN))


@every_variant
def test_the_teacher_may_be_another_network_with_other_parameters(method):
  """And so is the fake score: every network in training is moved in all its parameters, the teacher in none."""
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (STUDENT, OTHER_TEACHER)]
  assert sizes[0] != sizes[1]
  params = networks(method, OTHER_FAKE) | {'teacher': OTHER_TEACHER}

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def slopes(params, batch):
    held = bound(method, params, {'average': AVERAGE}, teacher=OTHER)
    return method.loss(held, batch, None, jnp.array(3))

  (loss, metrics), got = slopes(params, given(method))
  assert np.isfinite([loss, *metrics.values()]).all()
  teacher = got.pop('teacher')
  assert_same(teacher, jax.tree.map(np.zeros_like, OTHER_TEACHER))
  assert set(got) == set(method.trained)
  for path, slope in jax.tree_util.tree_leaves_with_path(got):
    assert np.isfinite(slope).all() and slope.any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize('name', ['progressive', 'dmd', 'dmd2'])
def test_an_update_binds_each_network_to_its_own_parameters(name):
  """The loss of an update is that of the two networks by hand; the fake score starts as the teacher is."""
  method, frozen = VARIANTS[name].at(VARIANTS[name].period - 1), FROZEN | {'teacher': OTHER_TEACHER}
  recipe = recipe_of(method, OTHER)
  params = recipe.create_state(STUDENT, OTHER_TEACHER).params
  loss, _, got = jax.jit(update.gradients)(recipe, params, frozen, given(method), KEY, jnp.array(3))
  by_hand, _ = method.loss(bound(method, params, frozen, teacher=OTHER), given(method), None, 3)
  np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
  assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, dict(params))


def test_a_bound_network_is_a_pytree_of_its_parameters():
  """They are its leaves, under a transformation too; what the network is stays static."""
  net, (z, cond) = Bound(DENOISE, STUDENT), (given(VARIANTS['denoising'])[k] for k in ('x', 'cond'))
  logsnr = jnp.linspace(-3.0, 3.0, len(z))
  assert_same(jax.tree.leaves(net), jax.tree.leaves(STUDENT))
  doubled = jax.tree.map(lambda p: 2.0 * p, net)
  expected = DENOISE(jax.tree.map(lambda p: 2.0 * p, STUDENT), z, logsnr, cond)
  assert_same(doubled(z, logsnr, cond), expected)
  assert jax.tree.structure(net) == jax.tree.structure(Bound(DENOISE, FAKE))
  assert jax.tree.structure(net) != jax.tree.structure(Bound(OTHER, STUDENT))
  assert_close(
    jax.jit(lambda net: net.bottleneck(z, logsnr, cond))(net), net.bottleneck(z, logsnr, cond)
  )


def test_stop_gradient_of_a_bound_network_isolates_its_parameters_and_not_its_input():
  z, cond = (given(VARIANTS['denoising'])[k] for k in ('x', 'cond'))
  logsnr = jnp.linspace(-3.0, 3.0, len(z))

  def total(net, z, hold):
    return jnp.sum(jnp.square((hold(net))(z, logsnr, cond).x))

  slopes = jax.grad(total, argnums=(0, 1))
  of_held, of_z = slopes(Bound(DENOISE, STUDENT), z, jax.lax.stop_gradient)
  of_free, of_z_free = slopes(Bound(DENOISE, STUDENT), z, lambda net: net)
  assert_same(of_held, jax.tree.map(np.zeros_like, of_held))
  assert all(slope.any() for slope in jax.tree.leaves(of_free))
  assert_close(of_z, of_z_free)
  assert np.abs(of_z).max() > 0.01


def test_the_target_of_consistency_has_no_gradient_where_it_is_the_student_itself():
  """It is as if the average were what the student is at this moment."""
  follows = dataclasses.replace(VARIANTS['consistency'], follows_average=True)
  itself = dataclasses.replace(follows, follows_average=False)

  @jax.jit
  @jax.grad
  def slopes(student, method, batch):
    held = bound(method, {'student': student}, {'teacher': TEACHER, 'average': STUDENT})
    return method.loss(held, batch, None, jnp.array(3))[0]

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
  cond, fake_score, head = batch['cond'], params['fake_score'], params.get('head')
  x = method.generate(Bound(DENOISE, params['student']), batch, None)

  def logit(fake_score, head, images):
    logsnr = SCHEDULE(batch['gan_t'])
    h = DENOISE.bottleneck(fake_score, diffuse(images, batch['gan_eps'], logsnr), logsnr, cond)
    return Head().apply({'params': head}, h)

  def critic(fake_score, head):
    of_fake, of_real = (logit(fake_score, head, images) for images in (x, batch['x']))
    return GAN.fake_weight * jnp.mean(jnp.log1p(jnp.exp(of_fake)) + jnp.log1p(jnp.exp(-of_real)))

  def of_student(student):
    images = method.generate(Bound(DENOISE, student), batch, None)
    logsnr = SCHEDULE(batch['t'])
    z = diffuse(x, batch['eps'], logsnr)
    fake, real = (DENOISE(p, z, logsnr, cond).x for p in (fake_score, TEACHER))
    scale = jnp.mean(jnp.abs(x - real), (1, 2, 3), keepdims=True)
    total = jnp.mean(images * (fake - real) / scale)
    if method.regression:
      pairs = batch['pairs']
      drawn = DENOISE(student, pairs['noise'], SCHEDULE(jnp.ones(len(x))), pairs['cond']).x
      total += method.regression * jnp.mean(jnp.square(drawn - pairs['image']))
    if method.gan:
      total += GAN.generator_weight * jnp.mean(jnp.log1p(jnp.exp(-logit(fake_score, head, images))))
    return total

  def of_fake_score(fake_score):
    logsnr = SCHEDULE(batch['fake_t'])
    z = diffuse(x, batch['fake_eps'], logsnr)
    errors = jnp.square(DENOISE(fake_score, z, logsnr, cond).x - x)
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


def examples(method):
  """An arbitrary batch as the training step is given it."""
  image = jnp.uint8(jax.random.randint(KEY, SHAPE, 0, 256))
  return {'image': image, 'cond': given(method)['cond'], 'pairs': given(method)['pairs']}


def updated(method, state):
  """One update of `state`, by the training step."""
  return STEP(recipe_of(method), state, FROZEN, examples(method))[0]


def leaf_pairs(tree, other):
  return zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)


@pytest.mark.slow
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
        old, new = (getattr(state, part)[network] for state in (before, after))
        assert all((a != b).any() for a, b in leaf_pairs(old, new)), (network, part)
  for old, new in zip(before.ema_params, turn.ema_params, strict=True):
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).any(), old, new))
