"""Training of low-rank adapters: where they start, what their gradients are, and what an update leaves alone."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion.process import from_v, from_x
from diffusion_distillation.methods import DMD, Knowledge
from diffusion_distillation.networks import lora
from diffusion_distillation.training import step as update
from diffusion_distillation.training.lora import Lora
from tests.methods import isolation_test as isolation
from tests.methods.methods_test import KEY, SCHEDULE, SHAPE, VARIANTS, dmd2, given

RANK, SCALE = 2, 0.5


@dataclasses.dataclass(frozen=True)
class Dense:
  """`isolation.Pointwise` with the names that dense layers have."""

  conditioning: ClassVar = isolation.DENOISE.conditioning

  def init(self, rng):
    made = isolation.DENOISE.init(rng)
    return {name: {'kernel' if leaf.ndim == 2 else 'bias': leaf} for name, leaf in made.items()}

  def bottleneck(self, params, *args):
    plain = {name: next(iter(of.values())) for name, of in params.items()}
    return isolation.DENOISE.bottleneck(plain, *args)

  def __call__(self, params, z, logsnr, cond, rng=None):
    return from_v(z, logsnr, self.bottleneck(params, z, logsnr, cond) @ params['outer']['kernel'])


DENOISE = Dense()
STUDENT, TEACHER = map(DENOISE.init, jax.random.split(KEY))
FROZEN = {'teacher': TEACHER, 'start': STUDENT, 'distance': None}
BASES = {'student': 'start', 'average': 'start', 'fake_score': 'teacher'}


def recipe_of(method, bases=None, rank=RANK):
  """A recipe whose student starts from weights of its own; adapted if there are bases."""
  made = isolation.recipe_of(method)
  networks = FrozenDict(method.networks(DENOISE, DENOISE))
  of = bases and Lora(rank, SCALE, '.*', tuple(sorted(bases.items())))
  return dataclasses.replace(made, networks=networks, lora=of or None)


def state_of(recipe):
  """A training state in which no factor is zero."""
  state, rng = recipe.create_state(STUDENT, TEACHER), np.random.default_rng(0)

  def moved(tree):
    leaves, structure = jax.tree.flatten(tree)
    new = [leaf + 0.3 * np.float32(rng.standard_normal(leaf.shape)) for leaf in leaves]
    return jax.tree.unflatten(structure, new)

  return dataclasses.replace(
    state, params=moved(state.params), ema_params=tuple(map(moved, state.ema_params))
  )


def test_the_state_has_the_factors_alone_and_every_network_starts_as_what_it_adapts():
  recipe = recipe_of(dmd2(), BASES)
  state = recipe.create_state(STUDENT, TEACHER)
  modules = {'inner', 'classes', 'outer'}
  for tree in (state.params['student'], state.params['fake_score'], *state.ema_params):
    assert set(tree) == modules and {
      leaf.shape[-1] for leaf in (of['down'] for of in tree.values())
    } == {2}
  assert set(state.params['head']) == set(DMD.init(dmd2(), STUDENT, TEACHER, KEY)['head'])
  nets = recipe.bind({**FROZEN, **state.params})
  for name, expected in (('student', STUDENT), ('fake_score', TEACHER), ('teacher', TEACHER)):
    isolation.assert_same(nets[name].params, expected)
  first, second = (state.params[name]['inner']['down'] for name in ('student', 'fake_score'))
  assert (first != second).all()
  own = jax.tree.leaves(state.params)
  assert len({id(leaf) for leaf in (*own, *jax.tree.leaves(state.ema_params))}) == 4 * 3 * 2 + len(
    jax.tree.leaves(state.params['head'])
  )


def test_no_update_draws_from_the_key_of_the_factors(monkeypatch):
  """An update folds its number, below 2^31, into the key of the seed."""
  folded = []
  fold_in = jax.random.fold_in
  monkeypatch.setattr(jax.random, 'fold_in', lambda key, data: folded.append(data) or fold_in(key, data))
  recipe = recipe_of(dmd2(), BASES)
  recipe._with_adapters(recipe.lora, {'student': STUDENT, 'fake_score': TEACHER})
  assert folded == [2**32 - 1]


METHODS = {name: VARIANTS[name] for name in ('progressive', 'knowledge', 'consistency')}
METHODS |= {'dmd': isolation.MATCHING['pairs_and_gan']}


@pytest.mark.parametrize('name', METHODS)
def test_a_factor_has_the_gradient_that_the_chain_rule_gives_it_from_that_of_its_kernel(name):
  """The loss is that of the merged networks, trained as a whole, so that each factor is moved by the loss of its own network."""
  method = METHODS[name].at(METHODS[name].period - 1)
  recipe, whole = recipe_of(method, BASES), recipe_of(method)
  state = state_of(recipe)
  held = {**FROZEN, **state.params, 'average': state.ema_params[0]}

  def merged(name, factors):
    return lora.merged(FROZEN[BASES[name]], factors, SCALE) if name in BASES else factors

  params = {name: merged(name, of) for name, of in state.params.items()}
  average = merged('average', state.ema_params[0])

  @jax.jit
  def both(batch):
    of_factors = update.gradients(recipe, state.params, held, batch, KEY, jnp.array(3))
    return of_factors, update.gradients(
      whole, params, {**FROZEN, 'average': average}, batch, KEY, jnp.array(3)
    )

  (loss, _, found), (expected_loss, _, of_kernels) = both(given(method))
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  assert set(found) == set(of_kernels) == set(method.trained)
  for network, factors in found.items():
    if network not in BASES:
      isolation.assert_close(factors, of_kernels[network])
      continue
    for module, of in factors.items():
      kernel, own = of_kernels[network][module]['kernel'], state.params[network][module]
      isolation.assert_close(of['up'], SCALE * own['down'].T @ kernel)
      isolation.assert_close(of['down'], SCALE * kernel @ own['up'].T)


def test_an_update_out_of_the_students_turn_moves_the_factors_of_the_fake_score_alone():
  method = dmd2(fake_updates=2)
  recipe = recipe_of(method.at(0), BASES)
  before = state_of(recipe)
  batch = isolation.examples(method)
  after, metrics = jax.jit(update.train_step)(recipe, before, FROZEN, batch)
  assert np.isfinite(metrics['loss'])
  isolation.assert_same(after.params['student'], before.params['student'])
  isolation.assert_same(after.ema_params, before.ema_params)
  moved = isolation.leaf_pairs(after.params['fake_score'], before.params['fake_score'])
  assert all((new != old).any() for new, old in moved)


@pytest.mark.parametrize('fake', [True, False])
def test_a_fake_score_that_is_not_adapted_is_trained_as_a_whole(fake):
  bases = BASES if fake else {'student': 'teacher'}
  state = jax.eval_shape(recipe_of(dmd2(), bases).create_state, STUDENT, TEACHER)
  shapes = jax.tree.map(lambda leaf: leaf.shape, state.params['fake_score'])
  assert (shapes == jax.tree.map(jnp.shape, TEACHER)) is not fake


@dataclasses.dataclass(frozen=True)
class Matrix:
  """x is the product of each pixel with a matrix."""

  conditioning: ClassVar[dict] = {}

  def __call__(self, params, z, logsnr, cond, rng=None):
    return from_x(z, logsnr, z @ params['pixel']['kernel'])


@pytest.mark.parametrize(('rank', 'reached'), [(4, True), (1, False)])
def test_adapters_of_full_rank_reach_every_matrix_and_those_of_rank_1_do_not(rank, reached):
  """Pairs of a teacher that is another matrix, whose difference from the base has rank 4."""
  method, channels = Knowledge(SCHEDULE), 4
  base, target, noise = (
    jax.random.normal(key, shape)
    for key, shape in zip(jax.random.split(KEY, 3), [(4, 4), (4, 4), (8, 4, 4, 4)], strict=True)
  )
  frozen = {'teacher': {'pixel': {'kernel': base}}, 'distance': None}
  recipe = recipe_of(method, {'student': 'teacher'}, rank)
  recipe = dataclasses.replace(
    recipe,
    networks=FrozenDict(method.networks(Matrix(), Matrix())),
    optimizer=dataclasses.replace(recipe.optimizer, weight_decay=0.0, clip_norm=100.0),
    learning_rate={'student': recipe.learning_rate['student'].replace(peak=0.03)},
    shape=(*SHAPE[:3], channels),
  )
  batch = {'cond': None, 'pairs': {'noise': noise, 'image': noise @ target, 'cond': None}}
  step = jax.jit(functools.partial(update.train_step, recipe))
  state = recipe.create_state(frozen['teacher'])
  for _ in range(400):
    state, _ = step(state, frozen, batch)
  found = recipe.weights('student', {**frozen, **state.params})['pixel']['kernel']
  apart = float(jnp.abs(found - target).max())
  assert apart < 1e-2 if reached else apart > 0.1
  assert np.linalg.matrix_rank(np.asarray(found - base), tol=1e-3) == rank


def test_without_adapters_a_recipe_is_what_it_was():
  recipe = recipe_of(dmd2())
  assert recipe.lora is None
  params = {'student': STUDENT, 'teacher': TEACHER, 'fake_score': TEACHER}
  assert recipe.weights('student', params) is STUDENT
  state = recipe.create_state(STUDENT, TEACHER)
  isolation.assert_same(state.params['student'], STUDENT)
  assert lora.adapted(STUDENT, '.*').keys() == {'inner', 'classes', 'outer'}
