"""An update of several networks: each has its own learning rate and moments."""

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
