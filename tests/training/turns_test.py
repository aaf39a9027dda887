"""An update of several networks: the learning rate of each, the average that a loss is given, and what is skipped."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.training import step
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.state import TrainState

RATES = {'student': 1e-3, 'fake_score': 3e-3}


def test_every_network_moves_by_its_own_learning_rate():
  """The first update of Adam has the size of the rate, whatever the gradient."""
  start = {name: {'w': jnp.zeros(3)} for name in RATES}
  adam = Adam()
  recipe = types.SimpleNamespace(
    learning_rate={name: LearningRate(rate, 10) for name, rate in RATES.items()},
    optimizer=adam,
    decays=(0.5,),
    ema_ramp=0.0,
    method=types.SimpleNamespace(period=1),
  )
  state = TrainState.create(start, adam.transform())
  grads = {'student': {'w': jnp.full(3, 0.1)}, 'fake_score': {'w': jnp.full(3, -0.2)}}
  (params, _, averages), metrics, finite = step._apply(recipe, state, jnp.zeros(()), grads)
  assert finite
  np.testing.assert_allclose(params['student']['w'], -1e-3, rtol=1e-5)
  np.testing.assert_allclose(params['fake_score']['w'], 3e-3, rtol=1e-5)
  np.testing.assert_allclose(averages[0]['w'], -0.5e-3, rtol=1e-5)
  assert metrics['learning_rate'] == np.float32(1e-3)
  assert metrics['fake_score_learning_rate'] == np.float32(3e-3)


def toy(loss):
  """A recipe of a method that trains the student by `loss(nets)`, and draws what it does not use."""
  method = types.SimpleNamespace(
    trained=('student',),
    period=1,
    loss=lambda nets, batch, rng, step: (loss(nets), {}),
    draw=lambda rng, shape: {'eps': jnp.zeros(shape)},
  )
  return types.SimpleNamespace(
    method=method,
    bind=dict,
    learning_rate={'student': LearningRate(1e-3, 10)},
    optimizer=Adam(),
    decays=(0.9, 0.5),
    target_decay=None,
    ema_ramp=0.0,
    seed=0,
    shape=(4, 1),
    conditioning={},
    cond_dropout=0.0,
    micro_batches=1,
  )


def zeros():
  return TrainState.create({'student': {'w': jnp.zeros(3)}}, Adam().transform(), 2)


def test_the_average_that_a_loss_is_given_is_the_first_moving_average():
  recipe = toy(lambda nets: jnp.sum(jnp.square(nets['student']['w'] - nets['average']['w'])))
  state = zeros().replace(ema_params=({'w': jnp.full(3, 2.0)}, {'w': jnp.full(3, 5.0)}))
  found, _, grads = step.loss_and_gradients(recipe, state, {}, {'cond': None})
  assert found == 12.0
  np.testing.assert_array_equal(grads['student']['w'], -4.0)


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too(backend, monkeypatch):
  """The square root has one at 0."""
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  recipe = toy(lambda nets: jnp.sum(jnp.sqrt(nets['student']['w'])))
  state, metrics = step.train_step(recipe, zeros(), {}, {'cond': None})
  assert metrics['loss'] == 0.0 and not np.isfinite(metrics['grad_norm'])
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1, 1, 1)
  before = zeros().replace(step=state.step, skipped=state.skipped, skipped_in_a_row=state.skipped)
  jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_ramp_counts_the_updates_of_the_student_alone():
  """A student whose turn is every third update: at its second, update 5, the half-life is 0.5 * 2 updates."""
  recipe = toy(lambda nets: jnp.sum(nets['student']['w']))
  recipe.decays, recipe.ema_ramp, recipe.method.period = (0.99,), 0.5, 3
  start = TrainState.create({'student': {'w': jnp.zeros(3)}}, Adam().transform(), 1)
  start = start.replace(step=jnp.array(5))
  state, _ = step.train_step(recipe, start, {}, {'cond': None})
  assert state.params['student']['w'][0] < -1e-4
  np.testing.assert_allclose(state.ema_params[0]['w'], state.params['student']['w'] / 2, rtol=1e-5)


def test_networks_that_are_clipped_together_share_one_norm():
  """Norms 3 and 4 make 5: clipped to 1 each network keeps its share of it; the student is clipped by itself."""
  grads = {'student': jnp.array([6.0]), 'fake_score': jnp.array([3.0]), 'head': jnp.array([0.0, 4.0])}
  for together, expected in (((), (1.0, 1.0)), (('fake_score', 'head'), (0.6, 0.8))):
    adam = Adam(b1=0.9, clipped_together=together)
    recipe = toy(None)
    recipe.optimizer = adam
    recipe.learning_rate = dict.fromkeys(grads, LearningRate(1e-3, 10))
    state = TrainState.create(jax.tree.map(jnp.zeros_like, grads), adam.transform(), 2)
    (_, moments, _), metrics, _ = step._apply(recipe, state, jnp.zeros(()), grads)
    first = {name: 10.0 * moments[name][1].mu for name in grads}
    np.testing.assert_allclose(first['student'], [1.0], rtol=1e-5)
    np.testing.assert_allclose(first['fake_score'], [expected[0]], rtol=1e-5)
    np.testing.assert_allclose(first['head'], [0.0, expected[1]], rtol=1e-5)
    norms = [metrics[f'{name}grad_norm'] for name in ('', 'fake_score_', 'head_')]
    np.testing.assert_allclose(norms, [6.0, 3.0, 4.0], rtol=1e-6)
  norms = {'student': 0.5, 'fake_score': 0.3, 'head': 0.4}
  assert Adam(clipped_together=('fake_score', 'head')).scales(norms) == dict.fromkeys(norms, 1.0)
