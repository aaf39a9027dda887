"""An update of several networks: the learning rate of each, and the average that a loss is given."""

import types

import jax.numpy as jnp
import numpy as np

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
    ema_decay=(0.5,),
  )
  state = TrainState.create(start, adam.transform())
  grads = {'student': {'w': jnp.full(3, 0.1)}, 'fake_score': {'w': jnp.full(3, -0.2)}}
  (params, _, averages), metrics = step._apply(recipe, state, grads)
  np.testing.assert_allclose(params['student']['w'], -1e-3, rtol=1e-5)
  np.testing.assert_allclose(params['fake_score']['w'], 3e-3, rtol=1e-5)
  np.testing.assert_allclose(averages[0]['w'], -0.5e-3, rtol=1e-5)
  assert metrics['learning_rate'] == np.float32(1e-3)
  assert metrics['fake_score_learning_rate'] == np.float32(3e-3)


def test_the_average_that_a_loss_is_given_is_the_first_moving_average():
  """A toy method, whose loss is the distance of the student from it."""

  def loss(nets, batch, rng, step):
    return jnp.sum(jnp.square(nets['student']['w'] - nets['average']['w'])), {}

  draw = lambda rng, shape: {'eps': jnp.zeros(shape)}  # noqa: E731
  recipe = types.SimpleNamespace(
    method=types.SimpleNamespace(trained=('student',), loss=loss, draw=draw),
    bind=dict,
    seed=0,
    shape=(4, 1),
    cond_dropout=0.0,
    micro_batches=1,
  )
  state = TrainState.create({'student': {'w': jnp.zeros(3)}}, Adam().transform(), 2)
  state = state.replace(ema_params=({'w': jnp.full(3, 2.0)}, {'w': jnp.full(3, 5.0)}))
  found, _, grads = step.loss_and_gradients(recipe, state, {}, {'cond': None})
  assert found == 12.0
  np.testing.assert_array_equal(grads['student']['w'], -4.0)
